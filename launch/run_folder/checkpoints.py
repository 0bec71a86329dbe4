"""What the checkpoints of a run say: which stages are done, how far the versions went, whose tokens they hold.

Every function raises UserError where the place of the checkpoints cannot be reached or a checkpoint cannot be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from buffer.processes import run_id
from buffer.trajectory.schema import TokenContract
from launch.errors import UserError, setting_up
from launch.run_folder.folder import is_run_folder, logged_stages, open_run_folder
from launch.settings.run import RunSettings
from learner.checkpoints.store import CheckpointStore, check_contract, durable_steps, open_checkpoints
from learner.messages import StageResult

CHECKPOINTS_FOLDER = "checkpoints"


@setting_up()
def stage_checkpoints(settings: RunSettings, folder: Path) -> dict[str, CheckpointStore]:
    """Where each stage's checkpoints are, by the name of the stage."""
    place = settings.learner.checkpoint_dir
    return {stage.name: open_checkpoints(place, folder, stage.name) for stage in settings.stages}


@setting_up()
def check_checkpoints(settings: RunSettings, folder: Path) -> None:
    """Raise UserError where a stage has written checkpoints, and none of them is where they are looked for."""
    durable = durable_steps(folder)
    for name, store in stage_checkpoints(settings, folder).items():
        if name in durable and not store.steps():
            raise UserError(
                f"stage {name} has written checkpoints up to step {durable[name]}, and none is found: it would begin "
                f"again. The last one was looked for at {store.location(durable[name])}: put the checkpoints back, or "
                f"say by learner.checkpoint_dir where the folder {run_id(folder)} lies now"
            )


@setting_up()
def steps_taken(settings: RunSettings, folder: Path) -> dict[str, int]:
    """Steps done by the newest checkpoint of each stage that has begun; 0 of one that has none yet."""
    begun, stores = logged_stages(folder), stage_checkpoints(settings, folder)
    newest = {name: store.progress(steps[-1]) for name, store in stores.items() if (steps := store.steps())}
    return dict.fromkeys(begun & stores.keys(), 0) | {name: progress.steps_done for name, progress in newest.items()}


@setting_up()
def finished_stages(settings: RunSettings, folder: Path) -> dict[str, StageResult]:
    """The stages of a run that are done, by name: they have a checkpoint of as many steps as the settings want."""
    results, stores = {}, stage_checkpoints(settings, folder)
    for stage in settings.stages:
        store = stores[stage.name]
        steps = store.steps()
        if steps and store.progress(steps[-1]).steps_done >= stage.steps:
            results[stage.name] = StageResult(stage.name, steps[-1], True, store.location(steps[-1]), 0.0)
    return results


@dataclass(frozen=True)
class RunCheckpoint:
    """A checkpoint of a run. location: its folder, or its URL where `learner.checkpoint_dir` is one; metrics: mean of
    each over the steps since the checkpoint before.
    """

    stage: str
    step: int
    location: str
    metrics: Mapping[str, float]


@setting_up()
def list_checkpoints(settings: RunSettings, folder: Path) -> list[RunCheckpoint]:
    """Every checkpoint of a run, in the order of the stages and their steps."""
    return [
        RunCheckpoint(stage, step, store.location(step), store.progress(step).metrics)
        for stage, store in stage_checkpoints(settings, folder).items()
        for step in store.steps()
    ]


@setting_up()
def newest_published(settings: RunSettings, folder: Path, contract: TokenContract) -> int:
    """Newest weights version of any checkpoint of the run, else -1; UserError if one has other tokens than these."""
    newest = -1
    for store in stage_checkpoints(settings, folder).values():
        for step in store.steps():
            progress = store.progress(step)
            check_contract(progress, contract, store.location(step))
            newest = max(newest, progress.policy_version)
    return newest


@setting_up()
def final_checkpoint(settings: RunSettings, folder: Path, stage: str) -> Path:
    """A local folder with the newest checkpoint of a stage that has one, fetched if need be."""
    store = stage_checkpoints(settings, folder)[stage]
    return store.folder(store.steps()[-1])


@setting_up()
def checkpoint_of(source: Path, stage: str | None = None) -> Path:
    """Of a run folder the newest checkpoint of `stage` (default: the recipe's `result`), fetched if it lies elsewhere;
    any other path as it is. UserError if `stage` is given without a run, or the run has no such stage or checkpoint.
    """
    if not is_run_folder(source):
        if stage is not None:
            raise UserError(f"--stage {stage} chooses a stage of a run, and {source} is not a run folder: leave it out")
        return source
    run, settings = open_run_folder(source)
    wanted = stage or settings.result_stage
    stores = stage_checkpoints(settings, run)
    if wanted not in stores:
        raise UserError(f"run {source} has no stage {wanted!r}; its stages are: {', '.join(stores)}")
    steps = {name: store.steps() for name, store in stores.items()}
    if not steps[wanted]:
        others = ", ".join(name for name, found in steps.items() if found) or "none"
        raise UserError(
            f"run {source} has no checkpoint of stage {wanted!r} yet: `sequencematch train --resume {source}` goes on "
            f"with it, and --stage chooses another (with checkpoints: {others})"
        )
    return stores[wanted].folder(steps[wanted][-1])


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint lies in, or that `checkpoint` is, if any."""
    if is_run_folder(checkpoint):
        return checkpoint.resolve()
    folders = [each for each in checkpoint.resolve().parents if each.name == CHECKPOINTS_FOLDER]
    return next((each.parent for each in folders if is_run_folder(each.parent)), None)
