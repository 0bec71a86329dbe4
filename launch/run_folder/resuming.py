"""The settings that a run is resumed with: which may change once it has taken steps, and a record of all so far."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from buffer.processes import RUN_ID_FILE
from launch.errors import UserError
from launch.run_folder.checkpoints import check_checkpoints, steps_taken
from launch.run_folder.folder import CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE, USED_CONFIGS_FOLDER, has_begun
from launch.settings.recipe import Tree, read_recipe, write_recipe
from launch.settings.run import RunSettings
from learner.settings.stages import with_explicit_starts

_MAY_CHANGE = ""
_SHAPED_THE_STEPS = "the steps so far were taken with it"

RULES = (
    ("name", "the run folder has its name already"),
    ("runs_folder", "the run lies where it lies; move its folder instead"),
    ("seed", _SHAPED_THE_STEPS),
    ("task.dataset", _MAY_CHANGE),  # where the examples are; a fingerprint says whether they are the same
    ("task.files*", _MAY_CHANGE),
    ("task.*", "it decides which examples there are"),
    ("noise.*", _SHAPED_THE_STEPS),
    ("model.*", "the checkpoints hold the model as it was begun"),
    ("stages.*.objective.*", _SHAPED_THE_STEPS),
    ("stages.*.steps", _MAY_CHANGE),  # within the bounds of `_refusal_in_stage`
    ("stages.*.optimizer.*", _MAY_CHANGE),
    ("stages.*.batch_size", _MAY_CHANGE),
    ("stages.*.rollout_batch_size", _MAY_CHANGE),
    ("stages.*.publish_every_steps", _MAY_CHANGE),
    ("stages.*.num_threads", _MAY_CHANGE),
    ("stages.*", _SHAPED_THE_STEPS),
    ("learner.param_dtype", "the checkpoints hold the weights and the moments of the optimizer in it"),
    ("learner.*", _MAY_CHANGE),
    ("actors.rollout.backspace", _SHAPED_THE_STEPS),
    ("actors.*", _MAY_CHANGE),
    ("scoring.*", "the rollouts in the buffer were scored by it"),
    ("buffer.archive", "the trajectories that have left the disk lie there"),
    ("buffer.*", _MAY_CHANGE),  # fewer shards are refused when the buffer is opened
    ("evaluation.*", _MAY_CHANGE),
    ("cluster.*", _MAY_CHANGE),
    ("result", _MAY_CHANGE),
    ("trackers", _MAY_CHANGE),
)
"""Key of a setting (`*` is anything) -> why it may not change once the run has taken steps. The first match counts.

A stage without steps is free: all of its settings may change.
"""

_KEPT_OF_A_RUN_WITHOUT_STEPS = {"lock", CONFIG_FILE, USED_CONFIGS_FOLDER, RUN_ID_FILE, ENVIRONMENT_FILE}


@dataclass(frozen=True)
class Change:
    """A setting that two recipes have otherwise. key: as in an override, e.g. `stages.pretrain.steps`."""

    key: str
    before: object
    after: object

    def __str__(self) -> str:
        before, after = ("null" if value is None else value for value in (self.before, self.after))
        return f"{self.key}: {before} -> {after}"


@contextmanager
def resumed_settings(folder: Path, wanted: RunSettings) -> Iterator[list[Change]]:
    """Let a run go on with `wanted`; gives what has changed since its newest settings, by whatever way.

    The settings are written down, so that the next resumption has them; unless the body raises UserError before it has
    taken a step. UserError if a change is refused, or checkpoints are missing.
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


def changes_between(before: RunSettings, after: RunSettings) -> list[Change]:
    """Every setting that differs, in the order of `after`; one that only one of them has is None in the other."""
    old, new = _flat(before), _flat(after)
    return [Change(key, old.get(key), new.get(key)) for key in {**new, **old} if old.get(key) != new.get(key)]


def check_changes(changes: Sequence[Change], after: RunSettings, steps_taken: Mapping[str, int]) -> None:
    """UserError, with all of them, for changes that cannot take effect, or would make another run of this one.

    after: with the changes. steps_taken: by each stage that has begun, as far as its newest checkpoint knows.
    """
    found = [(change, _refusal(change, after, steps_taken)) for change in changes]
    refused = [f"{change} ({why})" for change, why in found if why]
    if refused:
        raise UserError(
            f"the run has begun, so these settings stay as they are: {'; '.join(refused)}. Put them back, or start a "
            "new run"
        )


def why_fixed(key: str) -> str:
    """Why a setting may not change once the run has taken steps; empty where it may. KeyError if no rule knows it."""
    for pattern, why in RULES:
        if fnmatchcase(key, pattern):
            return why
    raise KeyError(key)


def _refusal(change: Change, after: RunSettings, steps_taken: Mapping[str, int]) -> str:
    section, _, rest = change.key.partition(".")
    name, _, setting = rest.partition(".")
    if section != "stages":
        return why_fixed(change.key)
    if name not in steps_taken:
        return _MAY_CHANGE
    return _refusal_in_stage(name, setting, after, steps_taken) or why_fixed(change.key)


def _refusal_in_stage(name: str, setting: str, after: RunSettings, steps_taken: Mapping[str, int]) -> str:
    """What the steps of a stage that has begun forbid, beyond `RULES`."""
    stages, taken = {stage.name: stage for stage in with_explicit_starts(after.stages)}, steps_taken[name]
    if name not in stages:
        return "the stage has begun"
    steps = stages[name].steps
    if setting != "steps":
        finished = f"the stage is finished, so nothing would come of it; to go on with it raise stages.{name}.steps"
        return finished if taken >= steps else ""
    if steps < taken:
        return f"the stage has taken {taken} steps"
    begun = [other.name for other in stages.values() if other.start_from == name and other.name in steps_taken]
    return f"stage {begun[0]} has begun with the weights that this one ended with" if begun and steps > taken else ""


def _flat(settings: RunSettings) -> Tree:
    """Value by dotted key. Entries of a list that have names, as stages do, go by them; other lists are values."""
    leaves: Tree = {}

    def visit(node: object, key: str) -> None:
        if isinstance(node, list) and node and all(isinstance(item, dict) and "name" in item for item in node):
            node = {item["name"]: item for item in node}
        if isinstance(node, dict) and node:
            for part, child in node.items():
                visit(child, f"{key}.{part}" if key else str(part))
        else:
            leaves[key] = node

    explicit = settings.model_copy(update={"stages": with_explicit_starts(settings.stages)})
    visit(explicit.model_dump(mode="json"), "")
    return leaves
