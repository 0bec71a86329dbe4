"""Objectives on hand-made logs: every one of the registry with settings that reach its branches, trees, counts."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import TypeAdapter

from learner.objectives.base import LogCounts, Objective
from learner.objectives.registry import make_objective
from learner.ranks.group import Ranks
from learner.settings.objectives import ObjectiveSettings
from learner.state_tree.batch import TreeBatch
from learner.state_tree.policy import TreePolicy

POINTWISE = [{"feature": "f"}]
OBJECTIVES: dict[str, dict[str, object]] = {
    "mle": {},
    "behaviour_cloning": {},
    "unlikelihood": {},
    "emo": {},
    "emo, mode 2": {"mode": 2, "ratio_cap": 3.0},
    "scheduled_sampling": {},
    "adversarial_js": {"discriminator": {"warmup_steps": 0}},
    "reinforce": {},
    "kl_control": {"beta": 0.3},
    "dpg": {"constraints": POINTWISE},
    "gdc": {"constraints": POINTWISE},
    "gdc_pp": {"constraints": POINTWISE},
    "f_dpg": {"constraints": POINTWISE, "divergence": "js"},
    "sequencematch": {"beta_start": 0.0, "beta_end": 0.0},
    "sequencematch, printed": {"beta_start": 0.5, "beta_end": 0.5, "estimator": "printed", "divergence": "kl"},
    "sequencematch, uniform": {"beta_start": 0.0, "beta_end": 0.0, "estimator": "uniform", "alpha": 0.1},
}
"""By name, and a comma and more where there are several; settings beside the name."""


def objective_settings(**values: object) -> ObjectiveSettings:
    """As a recipe gives them."""
    settings: ObjectiveSettings = TypeAdapter(ObjectiveSettings).validate_python(values)
    return settings


def objective_of(name: str, base: TreePolicy | None = None, features: Sequence[str] = ("f",), **settings) -> Objective:
    """An objective by its name; base: needed only where it is evaluated."""
    made = objective_settings(name=name, **settings)
    return make_objective(made, Ranks(), lambda: base, features)


def counts_of(*trees: TreeBatch) -> LogCounts:
    """Of these trees together."""
    return LogCounts(
        logs=sum(tree.num_trajectories for tree in trees),
        actions=sum(tree.num_actions for tree in trees),
        truncated_logs=sum(int(tree.trajectories.truncated.sum()) for tree in trees),
    )
