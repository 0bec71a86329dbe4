"""Objectives on hand-made trajectories: every one of the registry with settings that reach its branches, trees,
counts."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import TypeAdapter

from learner.objectives import make_objective
from learner.objectives.base import BatchCounts, Objective
from learner.ranks import Ranks
from learner.settings.objectives import ObjectiveSettings
from learner.state_tree.batch import TreeBatch
from learner.state_tree.policy import TreePolicy
from tests.oracle import Log

BACKSPACE, EOS = 3, 2

EXPERT_LOGS = [
    Log([1, 4], [5, 6, EOS], id="a"),
    Log([1, 4], [5, 7, BACKSPACE, 6, EOS], id="b"),
    Log([1, 4], [5, 5, 6, 5], finish_reason="max_length", id="c"),
    Log([1, 4, 5], [6, BACKSPACE, 6, EOS], executed={0: 7}, id="d"),
]


def rollout_log(name: str, actions: list[int], reward: float, reason: str = "eos") -> Log:
    """As an actor stores it; its feature says whether it has a reward."""
    scores = {"reward": reward, "features": [float(reward > 0)]}
    behavior = {"logprobs": [-0.1] * len(actions), "versions": [1] * len(actions), "temperature": 1.0}
    return Log([1, 4], actions, finish_reason=reason, source="policy", id=name, **behavior, **scores)


ROLLOUT_LOGS = [
    rollout_log("r", [8, BACKSPACE, 5, 6, EOS], 1.0),
    rollout_log("s", [8, BACKSPACE, 8, BACKSPACE], 0.0, "max_actions"),
    rollout_log("t", [5, 6, BACKSPACE, 6, EOS], 0.5),
]

POINTWISE = [{"feature": "f"}]
OBJECTIVES: dict[str, dict[str, object]] = {
    "mle": {},
    "behavior_cloning": {},
    "unlikelihood": {},
    "emo": {},
    "emo, mode 2": {"mode": 2, "ratio_cap": 3.0},
    "scheduled_sampling": {},
    "adversarial_js": {"discriminator": {"warmup_steps": 0}},
    "adversarial_js, own": {"pi": 0.3, "discriminator": {"warmup_steps": 0, "body": "own"}},
    "reinforce": {},
    "kl_control": {"beta": 0.3},
    "dpg": {"constraints": POINTWISE},
    "gdc": {"constraints": POINTWISE},
    "gdc_pp": {"constraints": POINTWISE},
    "f_dpg": {"constraints": POINTWISE, "divergence": "js"},
    "sequencematch": {"bc_weight_start": 0.0, "bc_weight_end": 0.0},
    "sequencematch, half": {"bc_weight_start": 0.5, "bc_weight_end": 0.5},
    "sequencematch, paper": {"bc_weight_start": 0.5, "bc_weight_end": 0.5, "estimator": "paper", "divergence": "kl"},
    "sequencematch, uniform": {"bc_weight_start": 0.0, "bc_weight_end": 0.0, "estimator": "uniform", "alpha": 0.1},
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


def counts_of(*trees: TreeBatch) -> BatchCounts:
    """Of these trees together."""
    return BatchCounts(
        trajectories=sum(tree.num_trajectories for tree in trees),
        actions=sum(tree.num_actions for tree in trees),
        truncated_trajectories=sum(int(tree.trajectories.truncated.sum()) for tree in trees),
    )
