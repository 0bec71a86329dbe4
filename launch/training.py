"""The train command after its settings are read: the run itself, its evaluation, and what is said at the end."""

from __future__ import annotations

import os
from pathlib import Path

import typer
from rich.console import Console

from launch.driver import RunOutcome
from launch.driver import train as run_stages
from launch.errors import EXIT_INTERRUPTED, RunFailedError, UserError
from launch.evaluation import Target, evaluate
from launch.evaluation_report import EVALUATION_FILE, SAMPLES_FOLDER, show_evaluation, write_evaluation
from launch.run_checkpoints import final_checkpoint
from launch.run_folder import CLUSTER_FILE, read_cluster
from launch.settings import RunSettings


def run_and_report(settings: RunSettings, folder: Path, console: Console, evaluate_after: bool) -> None:
    """Train all stages that are not done, then evaluate.

    Raises:
        UserError, RunFailedError: see `launch.driver.train`. typer.Exit: with 130, where it was interrupted.
    """
    check_not_live(folder)
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
    console.print(f"\nrun folder: {shown}", highlight=False, soft_wrap=True)


def check_not_live(folder: Path) -> None:
    """Refuse to resume a run whose driver still lives: two drivers would write the same files.

    Raises:
        UserError: it does.
    """
    if not (folder / CLUSTER_FILE).is_file():
        return
    pid = read_cluster(folder).driver_pid
    try:
        os.kill(pid, 0)  # signal 0 asks whether the process exists
    except ProcessLookupError:
        return
    except PermissionError:
        pass  # it exists, and is another user's
    raise UserError(
        f"run {folder.name} is live: process {pid} drives it. Stop that one first; if it is another program, the run "
        f"ended without cleaning up: delete {folder / CLUSTER_FILE}"
    )


def shown_path(folder: Path) -> Path:
    """The folder as a person would type it here."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def _evaluate(outcome: RunOutcome, settings: RunSettings, console: Console, shown: Path) -> None:
    stages = settings.evaluation.stages or (settings.stages[-1].name,)
    targets = [Target(stage, final_checkpoint(settings, outcome.folder, stage)) for stage in stages]
    try:
        evaluation = evaluate(targets, settings, console)
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


def _say_how_to_resume(console: Console, shown: Path, what: str) -> None:
    console.print(f"{what}; go on with: sequencematch train --resume {shown}", highlight=False, soft_wrap=True)
