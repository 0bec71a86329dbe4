"""The model that a run is for: what a command takes when it is given a run where it wants a checkpoint."""

from __future__ import annotations

from pathlib import Path

from launch.errors import UserError
from launch.run_folder.folder import is_run_folder, open_run_folder


def checkpoint_of(source: Path, stage: str | None = None) -> Path:
    """Of a run folder the newest checkpoint of `stage` (default: the recipe's `result`), fetched if it lies elsewhere;
    any other path as it is.

    Raises:
        UserError: the run has no such stage, or no checkpoint of it; or `stage` is given without a run. ValueError,
            OSError: the checkpoint cannot be fetched.
    """
    if not is_run_folder(source):
        if stage is not None:
            raise UserError(f"--stage {stage} chooses a stage of a run, and {source} is not a run folder: leave it out")
        return source
    from launch.run_folder.checkpoints import stage_checkpoints

    run, settings = open_run_folder(source)
    wanted = stage or settings.result_stage
    stores = stage_checkpoints(settings, run)
    if wanted not in stores:
        raise UserError(f"run {source} has no stage {wanted!r}; its stages are: {', '.join(stores)}")
    steps = {name: store.steps() for name, store in stores.items()}
    if not steps[wanted]:
        others = ", ".join(name for name, found in steps.items() if found)
        hint = f", or choose a stage that has one with --stage ({others})" if others else ""
        raise UserError(
            f"run {source} has no checkpoint of stage {wanted!r} yet: `sequencematch train --resume {source}` goes on "
            f"with it{hint}"
        )
    return stores[wanted].folder(steps[wanted][-1])
