"""The plan of a comparison: its objectives, the compared stage of a recipe, its start, and its steps.

The compared stage has the same name in all runs, because random numbers depend on seed, stage and step.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import yaml
from pydantic import Field, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from buffer.settings import Settings
from launch.errors import UserError
from launch.run_folder.folder import check_run_name
from launch.settings.recipe import Tree, apply_override, explain, read_yaml, settings_from
from launch.settings.run import RunSettings, needs_actors
from learner.settings.objectives import ObjectiveSettings
from learner.settings.stages import StageSettings, stages_before

PLAN_FILE = "comparison.yaml"
COMPARED_STAGE = "compared"
CHANGEABLE = ("noise", "actors", "buffer")
"""Sections of the recipe that an objective may override besides the compared stage: the start does not use them."""
FIXED_IN_STAGE = ("objective", "steps", "name", "start_from")
"""Settings of the compared stage that the comparison sets."""

_BETWEEN_OBJECTIVES = re.compile(r"\s*,[\s,]*(?=[^,=]*(?:[:,]|$))")
"""Commas before KEY= stand between the settings of one objective."""
_OBJECTIVE: TypeAdapter[ObjectiveSettings] = TypeAdapter(ObjectiveSettings)


class ComparedObjective(Settings):
    """An objective of a comparison. recipe: overrides of the recipe, as `noise.rate=0.1`, for its runs alone."""

    objective: ObjectiveSettings
    recipe: tuple[str, ...] = ()

    @classmethod
    def from_tree(cls, tree: Tree, where: str) -> ComparedObjective:
        """Parse an objective of a stage or of a file of objectives; UserError, which begins with `where`, if it is
        wrong."""
        overrides = tree.pop("recipe", [])
        if not isinstance(overrides, list) or not all(isinstance(override, str) for override in overrides):
            raise UserError(f"{where}: recipe is no list of overrides, as in `recipe: [noise.rate=0.1]`")
        known = _OBJECTIVE.json_schema()["discriminator"]["mapping"]
        if tree.get("name") not in known:
            raise UserError(f"{where}: unknown objective {tree.get('name')!r}; known: {', '.join(known)}")
        try:
            return cls(objective=_OBJECTIVE.validate_python(tree), recipe=tuple(overrides))
        except ValidationError as error:
            raise UserError(f"{where}: {explain(error, tree)}") from None


class ComparisonPlan(Settings):
    """A comparison; `comparison.yaml` in its folder.

    stage: of the recipe; all objectives use its batch sizes, optimizer and publication, unless they override them.
    objectives: by label; the others are compared with the first. steps: the budget of the compared stage.
    """

    recipe: RunSettings
    stage: str
    objectives: dict[str, ComparedObjective] = Field(min_length=2)
    seeds: tuple[NonNegativeInt, ...] = Field(min_length=1)
    steps: PositiveInt

    @property
    def reference(self) -> str:
        """The objective that the others are compared with."""
        return next(iter(self.objectives))

    @property
    def stages_before(self) -> tuple[StageSettings, ...]:
        """The stages that the compared one starts from."""
        return stages_before(self.recipe.stages, self.stage)

    def start_settings(self, seed: int) -> RunSettings | None:
        """The run before the compared stage; None if that is the first of the recipe."""
        before = self.stages_before
        return _run_settings(self.recipe, before, seed, "the start of the comparison") if before else None

    def run_settings(self, label: str, seed: int) -> RunSettings:
        """The run of one objective; UserError if its steps or overrides are not valid."""
        tree = self.recipe.model_dump(mode="json")
        stage = f"stages.{self.stage}"
        for override in self.objectives[label].recipe:
            key, own = f"{override.partition('=')[0]}.", [*CHANGEABLE, stage]
            is_fixed = key.startswith(tuple(f"{stage}.{part}." for part in FIXED_IN_STAGE)) or key == f"{stage}."
            if is_fixed or not key.startswith(tuple(f"{part}." for part in own)):
                raise UserError(
                    f"objective {label}: {override!r} would change what all objectives have in common; an objective "
                    f"may have its own {', '.join(own)}, the last without its {', '.join(FIXED_IN_STAGE)}"
                )
            apply_override(tree, override)
        recipe, before = settings_from(tree, f"objective {label}"), self.stages_before
        changes = {
            "name": COMPARED_STAGE,
            "start_from": before[-1].name if before else None,
            "objective": self.objectives[label].objective,
            "steps": self.steps,
        }
        compared = compared_stage(recipe, self.stage).model_copy(update=changes)
        return _run_settings(recipe, (*before, compared), seed, f"objective {label}")

    def to_yaml(self) -> str:
        """The content of its file."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=110)


def parse_objectives(text: str, stages: tuple[StageSettings, ...]) -> dict[str, ComparedObjective]:
    """Objectives `name` or `name:key=value,key=value`, separated by commas, by label.

    If one of `stages` has the objective, the settings of the first such stage are its defaults. UserError: an objective
    is unknown, malformed or named twice.
    """
    found: dict[str, ComparedObjective] = {}
    for spec in _BETWEEN_OBJECTIVES.split(text.strip(" ,")):
        name, colon, settings = spec.partition(":")
        if "=" in name or (colon and not settings):
            raise UserError(f"--objectives {spec} is no objective: write NAME, or NAME:KEY=VALUE")
        of_recipe = (each.objective.model_dump(mode="json") for each in stages if each.objective.name == name)
        tree: Tree = next(of_recipe, {"name": name})
        for override in settings.split(",") if settings else []:
            apply_override(tree, override.strip())
        label = re.sub(r"[^A-Za-z0-9_.]+", "-", spec).strip("-")
        if label in found:
            raise UserError(f"objective {spec} is named twice")
        found[label] = ComparedObjective.from_tree(tree, f"--objectives {spec}")
    return found


def read_objectives(path: Path) -> dict[str, ComparedObjective]:
    """Objectives of a YAML file by label, written as in a stage; `recipe` lists overrides for this objective.

    UserError: the file holds no such mapping, or a label cannot be a part of a run's name.
    """
    tree = read_yaml(path, "file of objectives")
    if not isinstance(tree, dict) or not all(isinstance(value, dict) for value in tree.values()):
        raise UserError(f"{path} is no mapping from labels to objectives, as in `cautious: {{name: emo, mode: 2}}`")
    return {
        check_run_name(str(label)): ComparedObjective.from_tree(value, f"{path}: {label}")
        for label, value in tree.items()
    }


def make_plan(
    recipe: RunSettings,
    objectives: Mapping[str, ComparedObjective],
    num_seeds: int,
    stage: str | None = None,
    steps: int | None = None,
) -> ComparisonPlan:
    """Check every objective before anything starts; UserError if one is not valid. steps: by default the stage's."""
    compared = compared_stage(recipe, stage)
    if len(objectives) < 2:
        raise UserError("name at least two objectives to compare, as in --objectives mle,sequencematch")
    if recipe.learner.checkpoint_dir is not None:
        raise UserError(
            f"learner.checkpoint_dir={recipe.learner.checkpoint_dir}: the runs of a comparison link to the "
            "checkpoints of their start in one folder; leave checkpoint_dir out, and choose the place with runs_folder"
        )
    from launch.run.checks import check_custom_parts

    check_custom_parts(recipe)
    labels: dict[ComparedObjective, str] = {}
    for label, each in objectives.items():
        if each in labels:
            raise UserError(f"objectives {labels[each]} and {label} are the same: leave one out, or change it")
        labels[each] = label
    seeds, steps = _seeds(recipe, num_seeds), steps or compared.steps
    plan = ComparisonPlan(recipe=recipe, stage=compared.name, objectives=dict(objectives), seeds=seeds, steps=steps)
    for label in plan.objectives:
        plan.run_settings(label, recipe.seed)
    return plan


def read_plan(folder: Path, num_seeds: int | None = None) -> ComparisonPlan:
    """The plan of an existing comparison; UserError if there is none. num_seeds: a new number of seeds."""
    file = folder / PLAN_FILE
    if not file.is_file():
        raise UserError(f"{folder} is not the folder of a comparison: it has no {PLAN_FILE}")
    try:
        plan = ComparisonPlan.model_validate(read_yaml(file, "plan"))
    except ValidationError as error:
        raise UserError(f"{file} is not a plan that `sequencematch compare` can read: {error}") from None
    return plan if num_seeds is None else plan.model_copy(update={"seeds": _seeds(plan.recipe, num_seeds)})


def compared_stage(recipe: RunSettings, name: str | None) -> StageSettings:
    """The stage of that name, else UserError; by default the first that learns from rollouts, else the last."""
    if name is None:
        return next((stage for stage in recipe.stages if stage.objective.needs_rollouts), recipe.stages[-1])
    stages = {stage.name: stage for stage in recipe.stages}
    if name not in stages:
        raise UserError(f"the recipe has no stage {name!r}; it has {', '.join(stages)}")
    return stages[name]


def _seeds(recipe: RunSettings, count: int) -> tuple[int, ...]:
    return tuple(range(recipe.seed, recipe.seed + count))


def _run_settings(recipe: RunSettings, stages: tuple[StageSettings, ...], seed: int, where: str) -> RunSettings:
    """The recipe with other stages; UserError, which begins with `where`, if a setting they need (a reward) is
    missing."""
    tree = recipe.model_dump(mode="json")
    tree |= {"stages": [stage.model_dump(mode="json") for stage in stages], "seed": seed, "result": None}
    tree["evaluation"]["stages"] = []
    tree["learner"]["checkpoint_best_metric"] = None  # not every objective has it; final checkpoints are compared
    if not any(needs_actors(stage, recipe.noise) for stage in stages):
        del tree["scoring"], tree["buffer"]  # these settings are refused in a run without rollouts
    return settings_from(tree, where)
