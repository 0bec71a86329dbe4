"""The train command after its settings are read: the run itself, its evaluation, and what is said at the end."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from launch.errors import EXIT_INTERRUPTED, RunFailedError
from launch.evaluation import Target, evaluate
from launch.evaluation.report import EVALUATION_FILE, SAMPLES_FOLDER, show_evaluation, write_evaluation
from launch.evaluation.task import EVALUATION_FOLDER
from launch.report.write import REPORT_FILE, write_report
from launch.run.driver import RunOutcome
from launch.run.driver import train as run_stages
from launch.run_folder.checkpoints import final_checkpoint
from launch.run_folder.folder import shown_path, sole_driver
from launch.settings.run import RunSettings


def run_and_report(settings: RunSettings, folder: Path, console: Console, evaluate_after: bool) -> None:
    """Train all stages that are not done, then evaluate.

    Raises:
        UserError: another process drives the run; and as RunFailedError: see `launch.run.driver.train`. typer.Exit:
            with 130, where it was interrupted.
    """
    with sole_driver(folder):
        _run_and_report(settings, folder, console, evaluate_after)


def _run_and_report(settings: RunSettings, folder: Path, console: Console, evaluate_after: bool) -> None:
    shown = shown_path(folder)
    try:
        outcome = run_stages(settings, folder, console)
    except KeyboardInterrupt:
        _say_how_to_resume(console, shown, "interrupted")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except RunFailedError:
        _say_how_to_resume(console, shown, "the run failed; what it saved is there")
        raise
    if not outcome.finished:
        _say_how_to_resume(console, shown, "interrupted")
        raise typer.Exit(EXIT_INTERRUPTED)
    if evaluate_after:
        _evaluate(outcome, settings, console, shown)
    _report(outcome.folder, console, shown)
    console.print(f"\nrun folder: {shown}", highlight=False, soft_wrap=True)


def _evaluate(outcome: RunOutcome, settings: RunSettings, console: Console, shown: Path) -> None:
    stages = settings.evaluation.stages or (settings.stages[-1].name,)
    targets = [Target(stage, final_checkpoint(settings, outcome.folder, stage)) for stage in stages]
    try:
        evaluation = evaluate(targets, settings, console, keep_in=outcome.folder / EVALUATION_FOLDER)
    except KeyboardInterrupt:
        console.print(f"evaluation interrupted; training is done. Repeat with: sequencematch train --resume {shown}")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    write_evaluation(evaluation, outcome.folder)
    console.print()
    show_evaluation(evaluation, console)
    console.print(
        f"\nall numbers: {shown}/{EVALUATION_FILE}, rollouts: {shown}/{SAMPLES_FOLDER}/",
        highlight=False,
        soft_wrap=True,
    )


def _report(folder: Path, console: Console, shown: Path) -> None:
    written = write_report(folder)
    for note in written.notes:
        console.print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {shown}/{REPORT_FILE}", highlight=False, soft_wrap=True)


def _say_how_to_resume(console: Console, shown: Path, what: str) -> None:
    console.print(f"{what}; go on with: sequencematch train --resume {shown}", highlight=False, soft_wrap=True)
