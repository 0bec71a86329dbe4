"""The train command after its settings are read: the run, its evaluation, and the messages at its end."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from actors.engine.checks import check_machine
from buffer.disk import is_disk_full
from launch.cluster.connection import cluster_to_join
from launch.errors import RunFailedError, RunStoppedError, UserError, setting_up
from launch.evaluation.report import SAMPLES_FOLDER, show_evaluation, write_evaluation
from launch.evaluation.results import EVALUATION_FILE, EVALUATION_FOLDER, Target, read_evaluation
from launch.evaluation.run import check_evaluation, evaluate
from launch.monitoring.run_log import RunLog
from launch.report.command import REPORT_FILE, write_report
from launch.run.driver import train as run_stages
from launch.run_folder.checkpoints import final_checkpoint, finished_stages
from launch.run_folder.folder import create_run_folder, has_begun, open_run_folder, run_config, shown_path, sole_driver
from launch.run_folder.resuming import resumed_settings
from launch.settings.recipe import read_recipe, with_absolute_paths
from launch.settings.run import RunSettings, needs_actors


def start_run(settings: RunSettings, name: str | None, console: Console, evaluate_after: bool) -> Path:
    """Train a new run, evaluate it, and return its folder. A run that is refused before its first step leaves none.

    Raises:
        UserError: the settings cannot be met. RunFailedError: see `launch.run.driver.train`.
        RunStoppedError: a signal stopped it.
    """
    with setting_up():
        folder, settings = open_run_folder(create_run_folder(settings, name))
    with sole_driver(folder):
        try:
            _run_and_report(settings, folder, console, evaluate_after)
        except (UserError, OSError) as error:
            if not has_begun(folder) and (isinstance(error, UserError) or is_disk_full(error)):
                shutil.rmtree(folder)  # the corrected command needs the name
            raise
    return folder


def resume_run(
    path: Path, console: Console, evaluate_after: bool, overrides: Sequence[str] = (), recipe: RunSettings | None = None
) -> None:
    """Train all stages of a run that are not done, and evaluate it; a finished run only gets a message.

    Changed settings are printed. overrides: of the run's own settings. recipe: replaces the run's own settings.
    Raises as `start_run`.
    """
    run_config(path)
    folder = path.resolve()
    with sole_driver(folder):
        wanted = with_absolute_paths(recipe or read_recipe(run_config(folder), overrides))
        if recipe is not None:
            own = read_recipe(run_config(folder))
            wanted = wanted.model_copy(update={"runs_folder": own.runs_folder})  # the run was found there
        with resumed_settings(folder, wanted) as changes:
            for change in changes:
                _say(console, f"changed since the run was last started: {change}")
            if changes:
                with RunLog(folder) as log:
                    for change in changes:
                        message = f"resumed with another setting: {change}"
                        log.write("info", "driver", "setting_changed", message, {"setting": change.key})
            last = wanted.stages[-1]
            if finished_stages(wanted, folder).keys() == {stage.name for stage in wanted.stages}:
                _say(
                    console,
                    f"run {folder.name} is finished: no stage is left to train (stages.{last.name}.steps is "
                    f"{last.steps}; with more steps it goes on)",
                )
                is_asked_for = any(change.key.startswith("evaluation.") for change in changes)
                if evaluate_after and (is_asked_for or not _is_evaluated(wanted, folder)):
                    _finish(folder, wanted, console, evaluate_after)
                return
            _run_and_report(wanted, folder, console, evaluate_after)


def _run_and_report(settings: RunSettings, folder: Path, console: Console, evaluate_after: bool) -> None:
    has_actors = any(needs_actors(stage, settings.noise) for stage in settings.stages)
    actors_here = has_actors and cluster_to_join(settings.cluster) is None  # on a cluster each engine checks its node
    if actors_here or evaluate_after:
        with setting_up():
            check_machine(settings.actors.enforce_eager or not actors_here)
    shown = shown_path(folder)
    try:
        check_task = partial(check_evaluation, settings) if evaluate_after else None
        finished = run_stages(settings, folder, console, check_task)
    except KeyboardInterrupt:
        finished = False
    except RunFailedError:
        _say_how_to_resume(console, shown, "the run failed; what it saved is there")
        raise
    if not finished:
        _say_how_to_resume(console, shown, "interrupted")
        raise RunStoppedError(f"run {folder} was stopped by a signal: go on with `launch.api.resume`")
    _finish(folder, settings, console, evaluate_after)


def _finish(folder: Path, settings: RunSettings, console: Console, evaluate_after: bool) -> None:
    shown = shown_path(folder)
    is_evaluated = not evaluate_after
    try:
        if evaluate_after:
            evaluation = evaluate(_targets(settings, folder), settings, console, keep_in=folder / EVALUATION_FOLDER)
            write_evaluation(evaluation, folder)
            console.print()
            show_evaluation(evaluation, console)
            _say(console, f"\nall numbers: {shown}/{EVALUATION_FILE}, rollouts: {shown}/{SAMPLES_FOLDER}/")
        is_evaluated = True
    finally:  # after any error or signal: training is done, and its result is saved
        if not is_evaluated:
            checkpoints = ", ".join(str(shown_path(target.checkpoint)) for target in _targets(settings, folder))
            _say(
                console,
                f"the evaluation did not end; training is done, and its result is in {checkpoints}. Repeat the "
                f"evaluation with: sequencematch train --resume {shown}",
            )
        for note in write_report(folder):
            console.print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)
        _say(console, f"report: {shown}/{REPORT_FILE}")
    _say(console, f"\nrun folder: {shown}")


def _targets(settings: RunSettings, folder: Path) -> list[Target]:
    """The checkpoints that the recipe evaluates."""
    stages = settings.evaluation.stages or (settings.result_stage,)
    return [Target(stage, final_checkpoint(settings, folder, stage)) for stage in stages]


def _is_evaluated(settings: RunSettings, folder: Path) -> bool:
    """Whether the run folder holds an evaluation of the final checkpoints, wherever the folder lay at that time."""
    evaluation = read_evaluation(folder)
    found = [(each.label, each.checkpoint.name) for each in evaluation.checkpoints] if evaluation else []
    return found == [(target.label, target.checkpoint.name) for target in _targets(settings, folder)]


def _say_how_to_resume(console: Console, shown: Path, what: str) -> None:
    _say(console, f"{what}; go on with: sequencematch train --resume {shown}")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
