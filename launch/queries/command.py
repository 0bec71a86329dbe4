"""The commands that look at the replay buffer of a run, live or finished: `sequencematch query` and `audit`."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from launch.commands import AsJson, path, reported_errors, stdout_kept_clean
from launch.errors import UserError, setting_up

if TYPE_CHECKING:
    from launch.queries.query import BufferDatabase

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


def audit(run: RunFolder, as_json: AsJson = False) -> None:
    """Check that every trajectory of a run is accounted for, also while the run goes on.

    Inserted = live + evicted + dropped, no id twice, no draw beyond the limits of the run, log and files consistent.
    Exit code 0: all is well; 1: it is not, and the ids are named.

    [dim]Example:[/dim] sequencematch audit runs/arithmetic-20260101-120000
    """
    with reported_errors(), stdout_kept_clean(as_json), setting_up():
        from buffer.reading.audit import DrawLimits, audit_buffer
        from launch.queries.audit_report import audit_to_json, show_audit
        from launch.run_folder.folder import BUFFER_FOLDER, open_run_folder

        folder, settings = open_run_folder(run)
        limits = DrawLimits(settings.buffer.max_times_sampled, settings.buffer.max_staleness)
        report = audit_buffer(folder / BUFFER_FOLDER, limits, partial(_image, folder))
        if not as_json:
            show_audit(report, limits, Console())
    if as_json:
        typer.echo(json.dumps(audit_to_json(report, limits)))
    if report.findings:
        raise typer.Exit(1)


def _image(run: Path, shard: Path) -> bytes:
    """The catalog of a shard that keeps the file to itself; Ray is imported for it alone."""
    from launch.run.control import catalog_image

    return catalog_image(run, shard)


@contextmanager
def _database(run: Path) -> Iterator[BufferDatabase]:
    from buffer.reading.snapshot import read_buffer
    from launch.queries.query import BufferDatabase
    from launch.queries.text_columns import TextColumns
    from launch.run_folder.folder import BUFFER_FOLDER, run_config
    from launch.run_folder.task import load_run_tokenizer

    folder = run_config(run).parent
    snapshot = read_buffer(folder / BUFFER_FOLDER, partial(_image, folder))
    texts = TextColumns(snapshot.contract, lambda: load_run_tokenizer(folder, snapshot.contract))
    database = BufferDatabase(snapshot, texts)
    try:
        yield database
    finally:
        database.close()


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
    from launch.queries.output import tables_to_json, write_result

    with _database(run) as database:
        if sql is not None:
            database.run(lambda: write_result(database.select(sql).to_arrow_reader(), form, sink))
        elif form is QueryFormat.JSON:
            sink.write(f"{json.dumps(tables_to_json(database.describe()))}\n".encode())
        else:
            raise UserError(f"--format {form} writes the result of a query: give one, or list the tables with json")


def _show(run: Path, sql: str | None) -> None:
    from launch.queries.output import show_tables

    console = Console()
    with _database(run) as database:
        if sql is None:
            show_tables(database.describe(), run, console)
        else:
            database.run(lambda: database.select(sql).show(max_width=console.width, max_rows=SHOWN_ROWS))
