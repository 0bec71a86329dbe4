"""`sequencematch query`: the result of one SELECT over a run's replay buffer, as a table or for programs."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import date, datetime
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from launch.commands import path, reported_errors, stdout_kept_clean
from launch.errors import UserError, setting_up

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN_ROWS = 50
"""Rows of a table for people; the other formats hold all."""

_SPOOL_BYTES = 64 * 2**20  # of a result, kept in memory until it goes to stdout as a whole


class QueryFormat(StrEnum):
    """A table for people; JSON (an array of objects), CSV and Arrow (an IPC stream) for programs."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    ARROW = "arrow"


RunFolder = Annotated[Path, typer.Argument(parser=path, help="Run folder, of a live run or a finished one.")]


def query(
    run: RunFolder,
    sql: Annotated[
        str | None, typer.Argument(help="One SELECT in DuckDB's SQL; without it, tables and columns are listed.")
    ] = None,
    form: Annotated[QueryFormat, typer.Option("--format", help="How the result is written.")] = QueryFormat.TABLE,
    output: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="Where to; by default stdout.")
    ] = None,
) -> None:
    """Ask the replay buffer of a run in SQL, also while the run goes on.

    [dim]Examples:[/dim]

    sequencematch query RUN

    sequencematch query RUN "select source, live, count(*) from trajectories group by all"

    sequencematch query RUN "select marked_text from trajectories order by created_at desc limit 5"

    sequencematch query RUN "select reason, count(*) from removals group by reason" --format json

    sequencematch query RUN "from trajectories where live" --format arrow --output live.arrows
    """
    with reported_errors(), tempfile.SpooledTemporaryFile(_SPOOL_BYTES) as spool:
        with setting_up():
            if form is not QueryFormat.TABLE:
                with stdout_kept_clean(active=True), _file_to_write(output, spool) as sink:
                    _write(run, sql, form, sink)
            elif output is None:
                _show(run, sql)
            else:
                raise UserError("a table is for the terminal: write a file with --format json, csv or arrow")
        spool.seek(0)
        shutil.copyfileobj(spool, sys.stdout.buffer)


def catalog_image(run: Path, shard: Path) -> bytes:
    """The catalog of a shard that keeps the file to itself; Ray is imported for it alone."""
    from launch.run import control

    return control.catalog_image(run, shard)


@contextmanager
def _file_to_write(path: Path | None, spool: IO[bytes]) -> Iterator[IO[bytes]]:
    """The file that becomes `path` when all is written, so that an error leaves no half of it; else the spool."""
    if path is None:
        yield spool
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(run: Path, sql: str | None, form: QueryFormat, sink: IO[bytes]) -> None:
    from launch.queries.database import open_database

    with closing(open_database(run)) as database:
        if sql is not None:
            write = {QueryFormat.JSON: _write_json, QueryFormat.CSV: _write_csv, QueryFormat.ARROW: _write_arrow}[form]
            database.run(lambda: write(database.select(sql).to_arrow_reader(), sink))
        elif form is QueryFormat.JSON:
            tables = database.describe().items()
            listed = {name: {"rows": num_rows, "columns": columns} for name, (num_rows, columns) in tables}
            sink.write(f"{json.dumps(listed)}\n".encode())
        else:
            raise UserError(f"--format {form} writes the result of a query: give one, or list the tables with json")


def _show(run: Path, sql: str | None) -> None:
    """A result, or what there is to ask, and how."""
    from launch.queries.database import open_database

    console = Console()
    with closing(open_database(run)) as database:
        if sql is not None:
            database.run(lambda: database.select(sql).show(max_width=console.width, max_rows=SHOWN_ROWS))
            return
        for name, (num_rows, columns) in database.describe().items():
            console.print(Text.assemble((name, "bold"), (f"  {num_rows:,} rows", "dim")))
            shown = [Text.assemble(column, " ", (_short_type(kind), "dim")) for column, kind in columns.items()]
            console.print(Text(", ").join(shown), "\n")
    example = "select task, count(*), avg(reward) from trajectories where live group by task"
    console.print(Text.assemble(("Example: ", "dim"), f'sequencematch query {run} "{example}"'), soft_wrap=True)


def _short_type(kind: str) -> str:
    return kind.partition("(")[0].lower().replace("timestamp with time zone", "timestamptz")


def _write_arrow(rows: pa.RecordBatchReader, sink: IO[bytes]) -> None:
    import pyarrow as pa

    with pa.ipc.new_stream(sink, rows.schema) as writer:
        for batch in rows:
            writer.write_batch(batch)


def _write_json(rows: pa.RecordBatchReader, sink: IO[bytes]) -> None:
    """One array of objects."""
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
