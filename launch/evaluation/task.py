"""Which task a checkpoint is evaluated on, and what it is called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launch.errors import UserError
from launch.evaluation.results import Target
from launch.run_folder.folder import CONFIG_FILE, is_run_folder, open_run_folder
from launch.settings.recipe import read_recipe
from launch.settings.run import RunSettings

CHECKPOINTS_FOLDER = "checkpoints"
EVALUATION_FOLDER = "evaluation"


def settings_for(checkpoint: Path, task_from: Path | None) -> RunSettings:
    """Settings of a run folder or a recipe; by default of the run that the checkpoint lies in, else UserError."""
    if task_from is not None:
        return open_run_folder(task_from)[1] if task_from.is_dir() else read_recipe(task_from)
    if not checkpoint.is_dir():
        raise UserError(f"no checkpoint at {checkpoint}")
    run = run_of(checkpoint)
    if run is None:
        raise UserError(f"{checkpoint} does not lie in a run folder: name its task with --task-from RUN or RECIPE")
    return open_run_folder(run)[1]


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint lies in, or that `checkpoint` is, if any."""
    if is_run_folder(checkpoint):
        return checkpoint.resolve()
    for parent in checkpoint.resolve().parents:
        if parent.name == CHECKPOINTS_FOLDER and (parent.parent / CONFIG_FILE).is_file():
            return parent.parent
    return None


def kept_folder(checkpoint: Path) -> Path | None:
    """Where evaluations of a run's checkpoints keep their rollouts; None for a checkpoint outside of a run."""
    run = run_of(checkpoint)
    return None if run is None else run / EVALUATION_FOLDER


def labelled(checkpoints: Sequence[Path]) -> list[Target]:
    """Targets with labels as short as tells them apart: of stage, step and run as few as that takes, or whole paths.

    Raises UserError where one is named twice.
    """
    folders = [checkpoint.resolve() for checkpoint in checkpoints]
    names = []
    for folder in folders:
        *_, run, kind, stage, step = ("", "", "", *folder.parts)
        names.append((run, stage, step) if kind == CHECKPOINTS_FOLDER else ("", step, step))
    for template in ("{1}", "{1}/{2}", "{0}", "{0}/{1}", "{0}/{1}/{2}", "{3}"):
        labels = [template.format(*each, folder) for each, folder in zip(names, folders, strict=True)]
        if len(set(labels)) == len(labels):
            return [Target(*pair) for pair in zip(labels, checkpoints, strict=True)]
    raise UserError("the same checkpoint is named twice")
