"""Results of a query, written as people or programs want them: a table, JSON, CSV or Arrow."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import IO

import pyarrow as pa
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from launch.queries.format import QueryFormat
from launch.queries.query import TableDescription

SHOWN_ROWS = 50
"""Rows of a table for people; the other formats hold all."""

_MIN_COLUMN_WIDTH = 12
_SHOWN_ELEMENTS = 12
_COLUMN_GAP = 2


def write_result(rows: pa.RecordBatchReader, form: QueryFormat, sink: IO[bytes]) -> None:
    """Write all rows in a format for programs: JSON is one array of objects, Arrow an IPC stream.

    Raises:
        OSError: `sink` does not take it. Whatever reading `rows` raises.
    """
    writers = {QueryFormat.JSON: _write_json, QueryFormat.CSV: _write_csv, QueryFormat.ARROW: _write_arrow}
    writers[form](rows, sink)


def _write_arrow(rows: pa.RecordBatchReader, sink: IO[bytes]) -> None:
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        for batch in rows:
            writer.write_batch(batch)


def _write_json(rows: pa.RecordBatchReader, sink: IO[bytes]) -> None:
    separator = "[\n"
    for batch in rows:
        for row in batch.to_pylist():
            sink.write(f"{separator}{json.dumps(_plain(row), ensure_ascii=False)}".encode())
            separator = ",\n"
    sink.write(b"[]\n" if separator == "[\n" else b"\n]\n")


def _write_csv(rows: pa.RecordBatchReader, sink: IO[bytes]) -> None:
    """Lists and structs as JSON; null is an empty field."""
    text = io.TextIOWrapper(sink, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows.schema.names)
    for batch in rows:
        columns = [[_csv_field(value) for value in column.to_pylist()] for column in batch.columns]
        writer.writerows(zip(*columns, strict=True))
    text.detach()


def _csv_field(value: object) -> object:
    plain = _plain(value)
    return json.dumps(plain, ensure_ascii=False) if isinstance(plain, list | dict) else plain


def _plain(value: object) -> object:
    """A value of Arrow as one of JSON: times in ISO 8601, no NaN or infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, Decimal):
        value = int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, datetime | date):
        return value.isoformat()
    return value if isinstance(value, bool | int | float | str | None) else str(value)


# For people


def show_result(rows: pa.RecordBatchReader, console: Console) -> None:
    """Print the first `SHOWN_ROWS` rows as a table, or one below the other where their columns do not fit."""
    shown: list[list[Text]] = []
    num_rows = 0
    for batch in rows:
        head = batch.slice(0, max(0, SHOWN_ROWS - num_rows)).to_pylist()
        shown += [[_cell(value) for value in row.values()] for row in head]
        num_rows += batch.num_rows
    names = rows.schema.names
    room = sum(_width_wanted(name, [row[index] for row in shown]) + _COLUMN_GAP for index, name in enumerate(names))
    if room <= console.width:
        console.print(_as_table(rows.schema, shown))
    else:
        console.print(_as_records(names, shown), soft_wrap=False)
    if num_rows > len(shown):
        console.print(f"{len(shown)} of {num_rows:,} rows; --format json, csv or arrow gives all", style="dim")
    elif num_rows == 0:
        console.print("no rows", style="dim")


def _width_wanted(name: str, cells: Sequence[Text]) -> int:
    longest = max((cell.cell_len for cell in cells), default=0)
    return max(len(name), min(longest, _MIN_COLUMN_WIDTH))


def _as_table(schema: pa.Schema, rows: Sequence[Sequence[Text]]) -> RenderableType:
    table = Table(box=None, padding=(0, _COLUMN_GAP, 0, 0), pad_edge=False, header_style="bold")
    for field in schema:
        number = pa.types.is_integer(field.type) or pa.types.is_floating(field.type) or pa.types.is_decimal(field.type)
        table.add_column(field.name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _as_records(names: Sequence[str], rows: Sequence[Sequence[Text]]) -> RenderableType:
    records: list[RenderableType] = []
    for number, row in enumerate(rows, start=1):
        record = Table(box=None, padding=(0, _COLUMN_GAP, 0, 0), pad_edge=False, show_header=False)
        record.add_column(style="bold", no_wrap=True)
        record.add_column(overflow="fold")
        for name, value in zip(names, row, strict=True):
            record.add_row(name, value)
        records += [Text(f"row {number}", style="dim"), record]
    return Group(*records)


def _cell(value: object) -> Text:
    if value is None:
        return Text("null", style="dim")
    return Text(_shown(value).replace("\n", "⏎").replace("\t", "⇥"))


def _shown(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case float():
            return f"{value:.6g}"
        case datetime():
            return value.strftime("%Y-%m-%d %H:%M:%S")
        case list():
            more = f", … {len(value) - _SHOWN_ELEMENTS} more" if len(value) > _SHOWN_ELEMENTS else ""
            return f"[{', '.join(_inner(element) for element in value[:_SHOWN_ELEMENTS])}{more}]"
        case dict():
            return "{" + ", ".join(f"{key}: {_inner(inner)}" for key, inner in value.items()) + "}"
        case _:
            return str(value)


def _inner(value: object) -> str:
    return "null" if value is None else _shown(value)


def show_tables(tables: Sequence[TableDescription], run: Path, console: Console) -> None:
    """Print what there is to ask, and how."""
    for table in tables:
        console.print(Text.assemble((table.name, "bold"), (f"  {table.num_rows:,} rows", "dim")))
        columns = [Text.assemble(name, " ", (_short_type(kind), "dim")) for name, kind in table.columns]
        console.print(Text(", ").join(columns), "\n")
    example = "select task, count(*), avg(reward) from trajectories where live group by task"
    console.print(Text.assemble(("Example: ", "dim"), f'sequencematch query {run} "{example}"'), soft_wrap=True)


def _short_type(kind: str) -> str:
    return kind.partition("(")[0].lower().replace("timestamp with time zone", "timestamptz")


def tables_to_json(tables: Sequence[TableDescription]) -> dict[str, object]:
    """What `show_tables` prints, for programs."""
    return {table.name: {"rows": table.num_rows, "columns": dict(table.columns)} for table in tables}
