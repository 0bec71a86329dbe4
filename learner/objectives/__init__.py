"""Objectives: functions from evaluated trajectories to a loss and its metrics. Each is built from its settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from buffer.custom import custom_class
from buffer.settings import CustomSettings
from learner.objectives.adversarial_js import AdversarialJs
from learner.objectives.base import Objective
from learner.objectives.score_function import RewardAscent
from learner.objectives.sequencematch import SequenceMatch
from learner.objectives.target_rules import TargetAscent
from learner.objectives.token_objectives import Emo, Likelihood, ScheduledSampling, Unlikelihood
from learner.ranks import Ranks
from learner.settings.objectives import (
    BaseObjectiveSettings,
    CustomObjectiveSettings,
    ObjectiveSettings,
    custom_objective_options,
)
from learner.state_tree.policy import TreePolicy

OBJECTIVES: Mapping[str, type[Objective]] = {
    "mle": Likelihood,
    "behavior_cloning": Likelihood,
    "unlikelihood": Unlikelihood,
    "emo": Emo,
    "scheduled_sampling": ScheduledSampling,
    "sequencematch": SequenceMatch,
    "adversarial_js": AdversarialJs,
    **dict.fromkeys(("reinforce", "kl_control"), RewardAscent),
    **dict.fromkeys(("dpg", "gdc", "gdc_pp", "f_dpg"), TargetAscent),
}


def make_objective(
    settings: ObjectiveSettings,
    ranks: Ranks | None = None,
    load_base: Callable[[], TreePolicy] | None = None,
    features: Sequence[str] = (),
) -> Objective:
    """The objective that `settings` describe. ranks, features: see `Objective`. load_base: gives the policy as it is at
    the start of the stage, frozen; called where it is needed. ValueError: the model that they name cannot be loaded."""
    base = None
    if settings.needs_base_model:
        assert load_base is not None, f"{settings.name} compares with the policy at the start of the stage"
        base = load_base()
    kind, own = objective_class(settings)
    return kind(own, ranks or Ranks(), base, tuple(features))


def objective_class(settings: ObjectiveSettings) -> tuple[type[Objective], BaseObjectiveSettings]:
    """The class of an objective, and the settings that it is made from: those of a custom one are its options.
    ValueError: see `buffer.custom`; or the class needs something else than `settings` say.
    """
    if not isinstance(settings, CustomObjectiveSettings):
        return OBJECTIVES[settings.name], settings
    kind, own = custom_class(settings, Objective), custom_objective_options(settings)
    for name in CustomObjectiveSettings.model_fields.keys() - CustomSettings.model_fields.keys():
        if (said := getattr(settings, name)) != getattr(own, name):
            raise ValueError(f"{settings.path} says {name}={getattr(own, name)}, and the settings {said}: leave it out")
    return kind, own
