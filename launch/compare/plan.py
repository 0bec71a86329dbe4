"""What a comparison does: which stage is compared, by which arms, from which start, for how long.

    starts/<seed>      the stages before the compared one, once per seed
    pilots/<arm>       a few steps of each arm, where the budget is in actions
    arms/<arm>/<seed>  the compared stage with the arm's objective

Each of these is a run. All arms have the same stage name, so that what a run draws by seed, stage and step is the same.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

import yaml
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from buffer.settings import Settings
from launch.compare.arms import Arm
from launch.errors import UserError
from launch.settings.files import read_yaml
from launch.settings.recipe import apply_override, settings_from
from launch.settings.run import RunSettings, needs_actors
from launch.settings.trusted_code import check_trusted
from learner.settings.objectives import AdversarialJsSettings
from learner.settings.stages import StageSettings, stages_before

PLAN_FILE = "comparison.yaml"
COMPARED_STAGE = "compared"
CHANGEABLE = ("noise", "actors", "buffer")
"""Sections of the recipe that an arm may have its own of, besides the compared stage: no start depends on them."""
FIXED_IN_STAGE = ("objective", "steps", "name", "start_from")
"""What the compared stage of an arm does not have from the recipe."""

PILOT_STEPS = 20
"""Enough for the mean of actions per step; that of rollouts is of many texts already in the first one."""


class ComparisonPlan(Settings):
    """A comparison; `comparison.yaml` in its folder. One of `steps` and `actions` is the budget of the compared stage.

    stage: of the recipe, whose batch sizes, optimizer and publication all arms have, unless they say otherwise. arms:
    by label; the first is what the others are compared with.
    """

    recipe: RunSettings
    stage: str
    arms: dict[str, Arm] = Field(min_length=2)
    seeds: tuple[NonNegativeInt, ...] = Field(min_length=1)
    steps: PositiveInt | None = None
    actions: PositiveInt | None = None

    @property
    def reference(self) -> str:
        """The arm that the others are compared with."""
        return next(iter(self.arms))

    @property
    def budget(self) -> str:
        """Of the compared stage, in words."""
        return f"{self.steps:,} steps" if self.steps is not None else f"{self.actions:,} actions"

    def pilot_steps(self, arm: str) -> int:
        """Steps of an arm's pilot, the first ones of a discriminator that learns alone not counted."""
        objective = self.arms[arm].objective
        alone = objective.discriminator.warmup_steps if isinstance(objective, AdversarialJsSettings) else 0
        return alone + PILOT_STEPS

    def start_settings(self, seed: int) -> RunSettings | None:
        """The run before the compared stage; None where that is the recipe's first."""
        before = stages_before(self.recipe.stages, self.stage)
        return _run_settings(self.recipe, before, seed, "the start of the arms") if before else None

    def arm_settings(self, arm: str, seed: int, steps: int) -> RunSettings:
        """The run of one arm.

        Raises:
            UserError: the objective does not accept so many steps, or the recipe not what the arm changes in it.
        """
        before = stages_before(self.recipe.stages, self.stage)
        recipe = self._recipe_of(arm)
        compared = compared_stage(recipe, self.stage).model_copy(
            update={
                "name": COMPARED_STAGE,
                "start_from": before[-1].name if before else None,
                "objective": self.arms[arm].objective,
                "steps": steps,
            }
        )
        return _run_settings(recipe, (*before, compared), seed, f"objective {arm}")

    def _recipe_of(self, arm: str) -> RunSettings:
        tree = self.recipe.model_dump(mode="json")
        stage = f"stages.{self.stage}"
        allowed = [*CHANGEABLE, stage]
        for override in self.arms[arm].recipe:
            apply_override(tree, override)
            key = override.partition("=")[0]
            if any(f"{key}.".startswith(f"{stage}.{fixed}.") for fixed in FIXED_IN_STAGE):
                raise UserError(
                    f"objective {arm}: {override!r} has no effect: stage {self.stage!r} has the objective that stands "
                    f"beside it, and its {', '.join(FIXED_IN_STAGE[1:])} from the comparison"
                )
            if not any(key.startswith(f"{part}.") for part in allowed):
                raise UserError(
                    f"objective {arm}: {override!r} would change what all arms have in common; an arm may have its own "
                    f"{', '.join(allowed)}"
                )
        return settings_from(tree, f"objective {arm}")

    def evaluation_settings(self, seed: int) -> RunSettings:
        """What the arms of a seed are evaluated by."""
        return self.recipe.model_copy(update={"seed": seed})

    def to_yaml(self) -> str:
        """As it stands in its file."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=110)


def make_plan(
    recipe: RunSettings,
    arms: Mapping[str, Arm],
    num_seeds: int,
    *,
    stage: str | None = None,
    steps: int | None = None,
    actions: int | None = None,
) -> ComparisonPlan:
    """Check every arm before anything starts.

    Args:
        arms: by label; the first is the reference. num_seeds: counted from the recipe's seed. stage: the compared
            one; None = see `compared_stage`. steps, actions: the budget; by default the steps of the compared stage.

    Raises:
        UserError: two arms are the same or there is one alone, an arm lacks what its objective needs, or the recipe
            does not suit a comparison.
    """
    compared = compared_stage(recipe, stage)
    if len(arms) < 2:
        raise UserError("name at least two objectives to compare, as in --objectives mle,sequencematch")
    if steps is not None and actions is not None:
        raise UserError("--steps and --actions are two budgets: give one of them")
    if recipe.learner.checkpoint_dir is not None:
        raise UserError(
            f"learner.checkpoint_dir={recipe.learner.checkpoint_dir}: the runs of a comparison share a start, and lie "
            "in one folder with it; leave checkpoint_dir out, and let runs_folder say where"
        )
    check_trusted(recipe.scoring)
    labels: dict[Arm, str] = {}
    for label, arm in arms.items():
        if arm in labels:
            raise UserError(f"objectives {labels[arm]} and {label} are the same: leave one out, or change it")
        labels[arm] = label
    plan = ComparisonPlan(
        recipe=recipe,
        stage=compared.name,
        arms=dict(arms),
        seeds=_seeds(recipe, num_seeds),
        steps=None if actions is not None else steps or compared.steps,
        actions=actions,
    )
    for label in plan.arms:
        plan.arm_settings(label, recipe.seed, plan.steps or plan.pilot_steps(label))
    return plan


def read_plan(folder: Path, num_seeds: int | None = None) -> ComparisonPlan:
    """The plan of an existing comparison. num_seeds: in place of those it was begun with, as for `make_plan`.

    Raises:
        UserError: the folder is none, or its plan was changed into something else.
    """
    file = folder / PLAN_FILE
    if not file.is_file():
        raise UserError(f"{folder} is not the folder of a comparison: it has no {PLAN_FILE}")
    tree = read_yaml(file, "plan")
    try:
        plan = ComparisonPlan.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{file} is not what `sequencematch compare` wrote there: {error}") from None
    return plan if num_seeds is None else plan.model_copy(update={"seeds": _seeds(plan.recipe, num_seeds)})


def _seeds(recipe: RunSettings, count: int) -> tuple[int, ...]:
    return tuple(range(recipe.seed, recipe.seed + count))


def compared_stage(recipe: RunSettings, name: str | None) -> StageSettings:
    """The stage of that name; by default the first that learns from rollouts, or the last if none does.

    Raises:
        UserError: the recipe has no such stage.
    """
    if name is None:
        return next((stage for stage in recipe.stages if stage.objective.needs_rollouts), recipe.stages[-1])
    names = [stage.name for stage in recipe.stages]
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"the stages are: {', '.join(names)}"
        raise UserError(f"the recipe has no stage {name!r}; {hint}")
    return recipe.stages[names.index(name)]


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
