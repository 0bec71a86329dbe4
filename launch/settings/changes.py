"""What differs between two recipes of one run, and which settings may change once the run has taken steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from launch.errors import UserError
from launch.settings.recipe import Tree
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
    ("stages.*.steps", _MAY_CHANGE),  # within the bounds of `_refusal_of_steps`
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


@dataclass(frozen=True)
class Change:
    """A setting that two recipes have otherwise. key: as in an override, e.g. `stages.trunk.steps`."""

    key: str
    before: object
    after: object

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.before)} -> {_shown(self.after)}"


def changes_between(before: RunSettings, after: RunSettings) -> list[Change]:
    """Every setting that differs, in the order of `after`; one that only one of them has is None in the other."""
    old, new = flat_settings(before), flat_settings(after)
    keys = [*new, *(key for key in old if key not in new)]
    return [Change(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def check_changes(changes: Sequence[Change], after: RunSettings, steps_taken: Mapping[str, int]) -> None:
    """Refuse what may not change in a run that has taken steps.

    after: with the changes. steps_taken: by each stage that has begun, as far as its newest checkpoint knows.

    Raises:
        UserError: a change cannot take effect, or would make another run of this one; it names every one of them.
    """
    found = [(change, _refusal(change, after, steps_taken)) for change in changes]
    refused = [f"{change} ({why})" for change, why in found if why]
    if refused:
        raise UserError(
            f"the run has begun, so these settings stay as they are: {'; '.join(refused)}. Put them back, or start a "
            "new run"
        )


def why_fixed(key: str) -> str:
    """Why a setting may not change once the run has taken steps; empty where it may.

    Raises:
        KeyError: no rule knows the setting.
    """
    for pattern, why in RULES:
        if fnmatchcase(key, pattern):
            return why
    raise KeyError(key)


def _refusal(change: Change, after: RunSettings, steps_taken: Mapping[str, int]) -> str:
    section, _, rest = change.key.partition(".")
    if section != "stages":
        return why_fixed(change.key)
    name, _, setting = rest.partition(".")
    if name not in steps_taken:
        return _MAY_CHANGE
    stage = next((stage for stage in after.stages if stage.name == name), None)
    if stage is None:
        return "the stage has begun"
    if setting == "steps":
        return _refusal_of_steps(name, stage.steps, after, steps_taken)
    if steps_taken[name] >= stage.steps:
        return f"the stage is finished, so nothing would come of it; to go on with it raise stages.{name}.steps"
    return why_fixed(change.key)


def _refusal_of_steps(name: str, steps: int, after: RunSettings, steps_taken: Mapping[str, int]) -> str:
    if steps < steps_taken[name]:
        return f"the stage has taken {steps_taken[name]} steps"
    if steps > steps_taken[name]:
        for stage in with_explicit_starts(after.stages):
            if stage.start_from == name and stage.name in steps_taken:
                return f"stage {stage.name} has begun with the weights that this one ended with"
    return _MAY_CHANGE


def flat_settings(settings: RunSettings) -> Tree:
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


def _shown(value: object) -> str:
    return "null" if value is None else str(value)
