"""Results of a query for programs (JSON, CSV, Arrow), and the list of tables; DuckDB shows a result to people."""

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
from rich.console import Console
from rich.text import Text

from launch.queries.command import QueryFormat
from launch.queries.query import TableDescription


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
