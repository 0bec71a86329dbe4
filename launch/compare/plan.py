"""What a comparison does: which objectives, in which stage of a recipe, from which start, for how long.

    starts/<seed>            the stages before the compared one, once per seed
    pilots/<objective>       a few steps of each objective, where the budget is in actions
    arms/<objective>/<seed>  the compared stage with the objective

Each of these is a run. The compared stage has the same name in all of them, so that the random numbers that a run
takes by seed, stage and step are the same.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml
from pydantic import Field, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from buffer.settings import Settings
from launch.errors import UserError
from launch.settings.files import read_yaml
from launch.settings.recipe import Tree, apply_override, explain, settings_from
from launch.settings.run import RunSettings, needs_actors
from launch.settings.trusted_code import check_trusted
from learner.settings.objectives import AdversarialJsSettings, ObjectiveSettings
from learner.settings.stages import StageSettings, stages_before

PLAN_FILE = "comparison.yaml"
COMPARED_STAGE = "compared"
RECIPE_KEY = "recipe"
"""In a file of objectives, beside an objective's own settings: what else is different in its runs."""
CHANGEABLE = ("noise", "actors", "buffer")
"""Sections of the recipe that an objective may have its own of, besides the compared stage: no start reads them."""
FIXED_IN_STAGE = ("objective", "steps", "name", "start_from")
"""What the compared stage of an objective does not have from the recipe."""
PILOT_STEPS = 20
"""Enough for the mean of actions per step; that of rollouts is of many texts already in the first one."""

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_OBJECTIVE: TypeAdapter[ObjectiveSettings] = TypeAdapter(ObjectiveSettings)


class ComparedObjective(Settings):
    """An objective of a comparison. recipe: overrides of the recipe, as `noise.rate=0.1`, for its runs alone."""

    objective: ObjectiveSettings
    recipe: tuple[str, ...] = ()

    @classmethod
    def from_tree(cls, tree: Tree, where: str) -> ComparedObjective:
        """Of what a stage of a recipe or a file of objectives holds. where: begins the error message.

        Raises:
            UserError: the objective is unknown, or a setting of it is not accepted.
        """
        overrides = tree.pop(RECIPE_KEY, [])
        if not isinstance(overrides, list) or not all(isinstance(override, str) for override in overrides):
            raise UserError(f"{where}: {RECIPE_KEY} is no list of overrides, as in `{RECIPE_KEY}: [noise.rate=0.1]`")
        schema = _OBJECTIVE.json_schema()
        name, known = str(tree.get("name")), sorted(schema["discriminator"]["mapping"])
        if name not in known:
            raise UserError(f"unknown objective {name!r}; {_nearest(name, known, 'known')}")
        try:
            return cls(objective=_OBJECTIVE.validate_python(tree), recipe=tuple(overrides))
        except ValidationError as error:
            raise UserError(f"{where}: {explain(error, schema)}") from None


class ComparisonPlan(Settings):
    """A comparison; `comparison.yaml` in its folder. One of `steps` and `actions` is the budget of the compared stage.

    stage: of the recipe, whose batch sizes, optimizer and publication all objectives have, unless they say otherwise.
    objectives: by label; the first is what the others are compared with.
    """

    recipe: RunSettings
    stage: str
    objectives: dict[str, ComparedObjective] = Field(min_length=2)
    seeds: tuple[NonNegativeInt, ...] = Field(min_length=1)
    steps: PositiveInt | None = None
    actions: PositiveInt | None = None

    @property
    def reference(self) -> str:
        """The objective that the others are compared with."""
        return next(iter(self.objectives))

    @property
    def budget(self) -> str:
        """Of the compared stage, in words."""
        return f"{self.steps:,} steps" if self.steps is not None else f"{self.actions:,} actions"

    @property
    def stages_before(self) -> tuple[StageSettings, ...]:
        """The stages that the compared one starts from."""
        return stages_before(self.recipe.stages, self.stage)

    def pilot_steps(self, label: str) -> int:
        """Steps of an objective's pilot, the first ones of a discriminator that learns alone not counted."""
        objective = self.objectives[label].objective
        alone = objective.discriminator.warmup_steps if isinstance(objective, AdversarialJsSettings) else 0
        return alone + PILOT_STEPS

    def start_settings(self, seed: int) -> RunSettings | None:
        """The run before the compared stage; None where that is the recipe's first."""
        before = self.stages_before
        return _run_settings(self.recipe, before, seed, "the start of the comparison") if before else None

    def run_settings(self, label: str, seed: int, steps: int) -> RunSettings:
        """The run of one objective.

        Raises:
            UserError: the objective does not accept so many steps, or the recipe not what the objective changes in it.
        """
        recipe, before = self._recipe_of(label), self.stages_before
        changes = {
            "name": COMPARED_STAGE,
            "start_from": before[-1].name if before else None,
            "objective": self.objectives[label].objective,
            "steps": steps,
        }
        compared = compared_stage(recipe, self.stage).model_copy(update=changes)
        return _run_settings(recipe, (*before, compared), seed, f"objective {label}")

    def _recipe_of(self, label: str) -> RunSettings:
        tree = self.recipe.model_dump(mode="json")
        stage = f"stages.{self.stage}"
        allowed = [*CHANGEABLE, stage]
        for override in self.objectives[label].recipe:
            apply_override(tree, override)
            key = override.partition("=")[0]
            if any(f"{key}.".startswith(f"{stage}.{fixed}.") for fixed in FIXED_IN_STAGE):
                raise UserError(
                    f"objective {label}: {override!r} has no effect: stage {self.stage!r} has the objective that "
                    f"stands beside it, and its {', '.join(FIXED_IN_STAGE[1:])} from the comparison"
                )
            if not any(key.startswith(f"{part}.") for part in allowed):
                raise UserError(
                    f"objective {label}: {override!r} would change what all objectives have in common; an objective "
                    f"may have its own {', '.join(allowed)}"
                )
        return settings_from(tree, f"objective {label}")

    def to_yaml(self) -> str:
        """As it stands in its file."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=110)


def parse_objectives(text: str, stages: tuple[StageSettings, ...]) -> dict[str, ComparedObjective]:
    """Objectives `name` or `name:key=value,key=value`, separated by commas, by label.

    An objective that `stages` (the first of them that has it) uses has the settings from there, then its own.

    Raises:
        UserError: one is unknown, malformed or named twice.
    """
    found: dict[str, ComparedObjective] = {}
    for spec in _split_at_objectives(text):
        name, colon, settings = spec.partition(":")
        if colon and not settings:
            raise UserError(f"--objectives {spec}: no setting after the colon; write {name}, or {name}:key=value")
        of_recipe = (each.objective.model_dump(mode="json") for each in stages if each.objective.name == name)
        tree: Tree = next(of_recipe, {"name": name})
        for override in settings.split(",") if settings else []:
            apply_override(tree, override)
        label = re.sub(r"[^A-Za-z0-9_.]+", "-", spec).strip("-")
        if label in found:
            raise UserError(f"objective {spec} is named twice")
        found[label] = ComparedObjective.from_tree(tree, f"--objectives {spec}")
    return found


def _split_at_objectives(text: str) -> list[str]:
    """Splits at commas; a part such as `alpha=0.1` goes on with the settings of the objective before it."""
    specs: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if "=" not in part.partition(":")[0]:
            specs.append(part)
        elif specs and ":" in specs[-1]:
            specs[-1] += f",{part}"
        else:
            raise UserError(f"--objectives: setting {part} follows no objective with settings; write NAME:{part}")
    return specs


def read_objectives(path: Path) -> dict[str, ComparedObjective]:
    """Objectives of a YAML file: a mapping from labels to objectives as a stage of a recipe has them, each of which may
    have a list `recipe` of overrides beside its own settings.

    Raises:
        UserError: see `read_yaml`; or the file holds no such mapping.
    """
    tree = read_yaml(path, "file of objectives")
    if not isinstance(tree, dict) or not all(isinstance(value, dict) for value in tree.values()):
        raise UserError(f"{path} is no mapping from labels to objectives, as in `cautious: {{name: emo, mode: 2}}`")
    for label in tree:
        if not _LABEL.fullmatch(str(label)):
            raise UserError(f"{path}: label {label!r} is to name a folder: use letters, digits, '_', '.' and '-'")
    return {str(label): ComparedObjective.from_tree(value, f"{path}: {label}") for label, value in tree.items()}


def make_plan(
    recipe: RunSettings,
    objectives: Mapping[str, ComparedObjective],
    num_seeds: int,
    *,
    stage: str | None = None,
    steps: int | None = None,
    actions: int | None = None,
) -> ComparisonPlan:
    """Check every objective before anything starts.

    Args:
        objectives: by label; the first is the reference. num_seeds: counted from the recipe's seed. stage: the compared
            one; None = see `compared_stage`. steps, actions: the budget; by default the steps of the compared stage.

    Raises:
        UserError: two objectives are the same or there is one alone, one lacks what it needs, or the recipe does not
            suit a comparison.
    """
    compared = compared_stage(recipe, stage)
    if len(objectives) < 2:
        raise UserError("name at least two objectives to compare, as in --objectives mle,sequencematch")
    if steps is not None and actions is not None:
        raise UserError("--steps and --actions are two budgets: give one of them")
    if recipe.learner.checkpoint_dir is not None:
        raise UserError(
            f"learner.checkpoint_dir={recipe.learner.checkpoint_dir}: the runs of a comparison share a start, and lie "
            "in one folder with it; leave checkpoint_dir out, and let runs_folder say where"
        )
    check_trusted(recipe.scoring)
    labels: dict[ComparedObjective, str] = {}
    for label, each in objectives.items():
        if each in labels:
            raise UserError(f"objectives {labels[each]} and {label} are the same: leave one out, or change it")
        labels[each] = label
    plan = ComparisonPlan(
        recipe=recipe,
        stage=compared.name,
        objectives=dict(objectives),
        seeds=_seeds(recipe, num_seeds),
        steps=None if actions is not None else steps or compared.steps,
        actions=actions,
    )
    for label in plan.objectives:
        plan.run_settings(label, recipe.seed, plan.steps or plan.pilot_steps(label))
    return plan


def read_plan(folder: Path, num_seeds: int | None = None) -> ComparisonPlan:
    """The plan of an existing comparison. num_seeds: in place of those it was begun with, as for `make_plan`.

    Raises:
        UserError: the folder is none, or its plan was changed into something else.
    """
    file = folder / PLAN_FILE
    if not file.is_file():
        raise UserError(f"{folder} is not the folder of a comparison: it has no {PLAN_FILE}")
    try:
        plan = ComparisonPlan.model_validate(read_yaml(file, "plan"))
    except ValidationError as error:
        raise UserError(f"{file} is not what `sequencematch compare` wrote there: {error}") from None
    return plan if num_seeds is None else plan.model_copy(update={"seeds": _seeds(plan.recipe, num_seeds)})


def compared_stage(recipe: RunSettings, name: str | None) -> StageSettings:
    """The stage of that name; by default the first that learns from rollouts, or the last if none does.

    Raises:
        UserError: the recipe has no such stage.
    """
    if name is None:
        return next((stage for stage in recipe.stages if stage.objective.needs_rollouts), recipe.stages[-1])
    stages = {stage.name: stage for stage in recipe.stages}
    if name not in stages:
        raise UserError(f"the recipe has no stage {name!r}; {_nearest(name, stages, 'the stages are')}")
    return stages[name]


def _nearest(name: str, known: Iterable[str], else_say: str) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {nearest[0]!r}?" if nearest else f"{else_say}: {', '.join(known)}"


def _seeds(recipe: RunSettings, count: int) -> tuple[int, ...]:
    return tuple(range(recipe.seed, recipe.seed + count))


def _run_settings(recipe: RunSettings, stages: tuple[StageSettings, ...], seed: int, where: str) -> RunSettings:
    """The recipe with other stages.

    Raises:
        UserError: the stages lack something, as a reward. where: begins the message.
    """
    tree = recipe.model_dump(mode="json")
    tree["stages"] = [stage.model_dump(mode="json") for stage in stages]
    tree["seed"] = seed
    tree["evaluation"]["stages"] = []
    tree["result"] = None
    tree["learner"]["checkpoint_best_metric"] = None  # not every objective has it, and the final checkpoints count
    if not any(needs_actors(stage, recipe.noise) for stage in stages):
        del tree["scoring"], tree["buffer"]  # both are of rollouts alone, and refused where there are none
    return settings_from(tree, where)
