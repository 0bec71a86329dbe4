"""The command `sequencematch report`, and the writing of the page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from buffer.disk import is_disk_full, writing_to
from launch.commands import path, provide_folder, reported_errors
from launch.errors import UserError

REPORT_FILE = "report.html"


def report(
    run: Annotated[Path, typer.Argument(parser=path, help="Run folder, of a live run or a finished one.")],
    output: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FILE", help="Output file; by default report.html in the run folder."),
    ] = None,
) -> None:
    """Write one HTML page about a run: curves, evaluation, weight pushes, rollouts to step through.

    The page is one file that loads nothing from the network, so you can send it to others. `train` writes it at its
    end.

    [dim]Example:[/dim] sequencematch report runs/arithmetic-20260101-120000
    """
    with reported_errors():
        from launch.run_folder.folder import run_config

        inside = run_config(run).parent
        provide_folder(inside if output is None else output.parent, "write the page elsewhere with --output FILE")
        notes = write_report(run, output)
    for note in notes:
        typer.echo(f"warning: {note}", err=True)
    typer.echo(f"report: {run / REPORT_FILE if output is None else output}")


def write_report(run: Path, path: Path | None = None) -> list[str]:
    """Write the report of a run, by default as `report.html` in its folder, in one step (write and rename).

    Returns notes on what could not be shown; the page has them too. UserError: see `gather`, or a file cannot be read
    or written.
    """
    from launch.report.gather import gather
    from launch.report.page import render

    path = run / REPORT_FILE if path is None else path
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        gathered = gather(run)
        with writing_to(path):
            temporary.write_text(render(gathered), encoding="utf-8")
        temporary.rename(path)
    except OSError as error:
        if is_disk_full(error):
            raise  # the command names the full disk
        raise UserError(str(error)) from None
    finally:
        temporary.unlink(missing_ok=True)
    return gathered.notes
