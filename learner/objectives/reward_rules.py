"""Methods that raise a reward R of rollouts x.

reinforce    E_pi[R grad log pi] (Williams 1992)
kl_control   E_pi[(R - beta log(pi / a)) grad log pi], with a the policy at the start of the stage; the optimum is
             a exp(R / beta) / Z, where the objective E[R] - beta KL(pi || a) is beta log Z (Korbak et al. 2022,
             arXiv 2206.00761)

Expectations are those over mu with weights pi / mu. Each rollout's reward is compared with the mean of the others',
weighted likewise: a baseline that does not depend on the rollout itself, so that the direction stays unbiased. Where
all rewards are equal the update is exactly zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from learner.objectives.score_function import Rollouts, Weighed


class RewardRule:
    """reinforce at beta = 0, kl_control beyond. It remembers nothing."""

    def __init__(self, beta: float = 0.0) -> None:
        self._beta = beta

    def weigh(self, rollouts: Rollouts) -> Weighed:
        """Weight times reward above baseline.

        Raises:
            ValueError: a rollout has no reward.
        """
        if rollouts.reward.isnan().any():
            missing = int(rollouts.reward.isnan().sum())
            raise ValueError(f"{missing} of {len(rollouts)} rollouts have no reward: set scoring.reward in the recipe")
        reward, weight = rollouts.reward, rollouts.weight
        metrics = {
            "reward_mean": float(reward.mean()),
            "reward_policy_mean": float(weighted_mean(reward, weight)),
            **weight_metrics(weight),
        }
        if self._beta:
            log_ratio = rollouts.log_pi - rollouts.log_base
            reward = reward - self._beta * log_ratio
            metrics["kl_base"] = float(weighted_mean(log_ratio, weight))
        return Weighed(weight * (reward - leave_one_out_mean(reward, weight)), metrics)

    def learn(self, rollouts: Rollouts) -> None:
        """Nothing is remembered."""

    def renews_proposal(self) -> bool:
        """Always: rollouts of the policy of now have the least variance."""
        return True

    def state(self) -> dict[str, Tensor]:
        """Nothing is remembered."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing was remembered."""
        assert not state


def leave_one_out_mean(values: Tensor, weight: Tensor) -> Tensor:
    """[N] for each, the weighted mean of the *others*' values; 0 where they have no weight at all.

    Not as total less own, which would cancel: equal values have exactly themselves as their mean.
    """
    others = weight.expand(len(weight), -1).clone().fill_diagonal_(0.0)
    total = others.sum(1)
    centre = values[:1]  # differences from one of the values: exactly zero where all are equal
    mean = centre + (others * (values - centre)).sum(1) / total
    return torch.where(total > 0, mean, 0.0)


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Mean over the last axis of [..., N] values under [N] weights that need not add up to N; 0 where all are 0."""
    total = weight.sum()
    return torch.where(total > 0, (weight * values).sum(-1) / total, 0.0)


def weight_metrics(weight: Tensor) -> dict[str, float]:
    """How far the rollouts are from the policy: the effective sample size is (sum w)^2 / sum w^2 of N (Kong 1992)."""
    squares = weight.square().sum()
    effective = torch.where(squares > 0, weight.sum().square() / squares, 0.0)
    return {
        "importance_weight_mean": float(weight.mean()),
        "effective_sample_share": float(effective) / len(weight),
    }
