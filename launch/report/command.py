"""The command `sequencematch report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.command_errors import provide_folder, reported_errors
from launch.command_options import path


def report(
    run: Annotated[Path, typer.Argument(parser=path, help="Run folder, of a live run or a finished one.")],
    output: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FILE", help="Where to; by default report.html in the run folder."),
    ] = None,
) -> None:
    """Write one HTML page about a run: curves, evaluation, weight pushes, rollouts to step through.

    The page holds all that it shows and loads nothing, so it can be sent around. `train` writes it at its end.

    [dim]Example:[/dim] sequencematch report runs/arithmetic-20260101-120000
    """
    with reported_errors():
        from launch.report.write import write_report
        from launch.run_folder.folder import run_config

        inside = run_config(run).parent
        provide_folder(inside if output is None else output.parent, "write the page elsewhere with --output FILE")
        written = write_report(run, output)
    for note in written.notes:
        typer.echo(f"warning: {note}", err=True)
    typer.echo(f"report: {written.path}")
