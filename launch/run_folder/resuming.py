"""The settings that a run is resumed with: those it has had, with what has changed since, and a record of both."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from buffer.run_identity import RUN_ID_FILE
from launch.errors import UserError
from launch.run_folder.checkpoints import check_checkpoints, steps_taken
from launch.run_folder.folder import CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE, USED_CONFIGS_FOLDER, has_begun
from launch.settings.changes import Change, changes_between, check_changes
from launch.settings.recipe import read_recipe, write_recipe
from launch.settings.run import RunSettings

_KEPT_OF_A_RUN_WITHOUT_STEPS = {"lock", CONFIG_FILE, USED_CONFIGS_FOLDER, RUN_ID_FILE, ENVIRONMENT_FILE}


@contextmanager
def resumed_settings(folder: Path, wanted: RunSettings) -> Iterator[list[Change]]:
    """Let a run go on with `wanted`; gives what has changed since its newest settings, by whatever way.

    The settings are written down, so that the next resumption has them; unless the body raises UserError before it has
    taken a step.

    Raises:
        UserError: a change is refused, or checkpoints are missing.
    """
    used = sorted((folder / USED_CONFIGS_FOLDER).iterdir())
    before = read_recipe(used[-1])
    changes = changes_between(before, wanted)
    check_checkpoints(wanted, folder)
    if not changes:
        yield []
        return
    taken = steps_taken(before.model_copy(update={"learner": wanted.learner}), folder)
    try:
        check_changes(changes, wanted, taken)
    except UserError:
        if taken:
            raise
        _forget_all_but_settings(folder)  # what other settings have made, without a step
    config, metrics_bytes = (folder / CONFIG_FILE).read_text(encoding="utf-8"), _metrics_bytes(folder)
    note = folder / USED_CONFIGS_FOLDER / f"{len(used) + 1:03d}.yaml"
    write_recipe(wanted, folder / f"{CONFIG_FILE}.tmp")
    (folder / f"{CONFIG_FILE}.tmp").rename(folder / CONFIG_FILE)
    write_recipe(wanted, note)
    try:
        yield changes
    except UserError:
        if _metrics_bytes(folder) == metrics_bytes:
            note.unlink()
            (folder / CONFIG_FILE).write_text(config, encoding="utf-8")
        raise


def _metrics_bytes(folder: Path) -> int:
    return (folder / METRICS_FILE).stat().st_size if has_begun(folder) else 0


def _forget_all_but_settings(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name in _KEPT_OF_A_RUN_WITHOUT_STEPS:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
