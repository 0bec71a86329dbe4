"""Objectives that climb along a score function: E_mu[c(x) grad log pi(x)] over whole rollouts x.

Here pi is the current policy, and mu the one that made the rollout; the actor stored its log-probabilities. x is the
whole sequence of actions, backspaces and `<eos>` included, or those before the rollout was truncated. pi is taken at
temperature 1, and mu is the distribution that the actors sampled from, whatever their temperature.

The coefficient c of a rollout may depend on all rollouts of the step, which are in several passes and at several ranks.
So a step has two rounds. The first evaluates all rollouts without gradient and gathers a few numbers of each at every
rank (`Rollouts`); the coefficients follow from these. The second has the gradient, of -sum_i c_i log pi(x_i) / N.

Two methods raise a reward R (`RewardAscent`); those with a target distribution: `learner.objectives.target_rules`.

reinforce    E_pi[R grad log pi] (Williams 1992)
kl_control   E_pi[(R - beta log(pi / a)) grad log pi], with a the policy at the start of the stage; the optimum is
             a exp(R / beta) / Z, where the objective E[R] - beta KL(pi || a) is beta log Z (Korbak et al. 2022,
             arXiv 2206.00761)

Expectations are those over mu with weights pi / mu. Each rollout's reward is compared with the mean of the others',
weighted likewise: a baseline that does not depend on the rollout itself, so that the direction stays unbiased. Where
all rewards are equal the update is exactly zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from learner.objectives.base import BatchCounts, EvaluatedTrajectories, Metrics, Objective, rollout_metrics
from learner.settings.objectives import KlControlSettings, ReinforceSettings
from learner.state_tree.batch import TreeBatch
from learner.state_tree.policy import TreePolicy

_NUM_PLAIN_COLUMNS = 6


@dataclass(frozen=True)
class Rollouts:
    """N rollouts as numbers: float64, in host memory, without gradient.

    key, context: [N] numbers of trajectory and prompt, equal for equal ones. log_pi, log_mu, log_base: [N] of the whole
    trajectory, under the current policy, the one that made it, and the frozen one (nan without one). reward: [N] (nan
    without one). features: [N, F].
    """

    key: Tensor
    context: Tensor
    log_pi: Tensor
    log_mu: Tensor
    log_base: Tensor
    reward: Tensor
    features: Tensor

    @property
    def weight(self) -> Tensor:
        """[N] pi(x) / mu(x)."""
        return (self.log_pi - self.log_mu).exp()

    def __len__(self) -> int:
        return len(self.log_pi)

    def __getitem__(self, rows: Tensor) -> Rollouts:
        return replace(self, **{name: values[rows] for name, values in vars(self).items()})


class Weighed(NamedTuple):
    """coefficients: [N] c of each rollout. metrics: of the whole step."""

    coefficients: Tensor
    metrics: Mapping[str, float]


class ScoreFunction(Objective, ABC):
    """The two rounds of a step. Methods differ in the coefficients, and in what else they learn from rollouts."""

    _rollouts: Rollouts | None = None
    _coefficient: Mapping[int, float] = MappingProxyType({})
    _metrics: Mapping[str, float] = MappingProxyType({})

    @abstractmethod
    def weigh(self, rollouts: Rollouts) -> Weighed:
        """The coefficients of a step, from its rollouts and the state so far. ValueError: the rollouts lack a reward or
        a feature that the method needs."""

    def learn(self, rollouts: Rollouts) -> None:
        """Update the state for later steps, after the loss of a step."""

    def begin_step(self, policy: TreePolicy, rollouts: Sequence[TreeBatch], counts: BatchCounts, step: int) -> None:
        table = self._gather(torch.cat([self._look_at(policy, tree) for tree in self._of_all_ranks(rollouts)]))
        if self.base is not None:
            self.base.release()
        assert len(table) == counts.trajectories
        key, context, log_pi, log_mu, log_base, reward = table[:, :_NUM_PLAIN_COLUMNS].unbind(1)
        gathered = Rollouts(key.long(), context.long(), log_pi, log_mu, log_base, reward, table[:, _NUM_PLAIN_COLUMNS:])
        sound = log_pi.isfinite() & (log_base.isfinite() if self.base is not None else True)
        # The loss will not be finite either, where the policy gave no number; with a coefficient that is one, the
        # trainer can tell the rollouts to blame for it from those that only shared a pass with them.
        coefficients = torch.full_like(log_pi, torch.nan).masked_fill(~log_pi.isfinite(), 1.0)
        self._rollouts, self._metrics = gathered[sound], {}
        if sound.any():
            coefficients[sound], self._metrics = self.weigh(self._rollouts)
        self._coefficient = dict(zip(key.long().tolist(), coefficients.tolist(), strict=True))

    def rollout_loss(
        self, rollouts: EvaluatedTrajectories, data_counts: BatchCounts, step: int
    ) -> tuple[Tensor, Metrics]:
        """-c log pi, mean over the rollouts of the global batch."""
        tree, log_prob = rollouts.tree, rollouts.values.log_prob
        coefficients = log_prob.new_tensor([self._coefficient[_key(name)] for name in tree.trajectories.ids])
        loss = -rollouts.mean_over_trajectories(coefficients[tree.actions.trajectory] * log_prob)
        of_step = {name: loss.new_tensor(value * rollouts.fraction) for name, value in self._metrics.items()}
        return loss, rollout_metrics(rollouts, loss, **of_step)

    def optimizer_step(self) -> None:
        assert self._rollouts is not None, "optimizer_step() comes after begin_step()"
        self.learn(self._rollouts)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _look_at(self, policy: TreePolicy, tree: TreeBatch) -> Tensor:
        """[L, 6 + F] columns of `Rollouts`."""
        tree = tree.to(policy.device)
        trajectories = tree.trajectories
        log_pi, log_mu = (
            trajectories.sum_of_actions(each.double())
            for each in (policy.evaluate(tree).log_prob, tree.actions.behavior_log_prob)
        )
        log_base = torch.full_like(log_pi, torch.nan)
        if self.base is not None:
            log_base = trajectories.sum_of_actions(self.base.evaluate(tree).log_prob.double())
        keys = torch.tensor([_key(name) for name in trajectories.ids], dtype=torch.float64)
        columns = [
            trajectories.context,
            log_pi,
            log_mu,
            log_base,
            trajectories.reward,
            *trajectories.features.unbind(1),
        ]
        return torch.stack([keys, *(column.cpu().double() for column in columns)], dim=1)

    def _gather(self, own: Tensor) -> Tensor:
        """[N, K] the rows [n, K] of all ranks, in the order of ranks, at every rank."""
        if self.ranks.size == 1:
            return own
        counts = torch.zeros(self.ranks.size, dtype=torch.float64)
        counts[self.ranks.rank] = len(own)
        counts = self.ranks.sum_vector(counts).long()
        begin = int(counts[: self.ranks.rank].sum())
        table = torch.zeros(int(counts.sum()), own.shape[1], dtype=torch.float64)
        table[begin : begin + len(own)] = own
        return self.ranks.sum_vector(table)


class RewardAscent(ScoreFunction):
    """reinforce and kl_control. It has no state."""

    settings: ReinforceSettings | KlControlSettings

    def weigh(self, rollouts: Rollouts) -> Weighed:
        """Weight times reward above baseline. ValueError: a rollout has no reward."""
        if rollouts.reward.isnan().any():
            missing = int(rollouts.reward.isnan().sum())
            raise ValueError(f"{missing} of {len(rollouts)} rollouts have no reward: set scoring.reward in the recipe")
        reward, weight = rollouts.reward, rollouts.weight
        metrics = {
            "reward_mean": float(reward.mean()),
            "reward_policy_mean": float(weighted_mean(reward, weight)),
            **weight_metrics(weight),
        }
        if isinstance(self.settings, KlControlSettings):
            log_ratio = rollouts.log_pi - rollouts.log_base
            reward = reward - self.settings.beta * log_ratio
            metrics["kl_base"] = float(weighted_mean(log_ratio, weight))
        return Weighed(weight * (reward - leave_one_out_mean(reward, weight)), metrics)


def leave_one_out_mean(values: Tensor, weight: Tensor) -> Tensor:
    """[N] for each, the weighted mean of the *others*' values; 0 where they have no weight at all. Not as total less
    own, which would cancel: equal values have exactly themselves as their mean."""
    others = weight.expand(len(weight), -1).clone().fill_diagonal_(0.0)
    total = others.sum(1)
    center = values[:1]  # differences from one of the values: exactly zero where all are equal
    mean = center + (others * (values - center)).sum(1) / total
    return torch.where(total > 0, mean, 0.0)


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Mean over the last axis of [..., N] values under [N] weights that need not add up to N; 0 where all are 0."""
    total = weight.sum()
    return torch.where(total > 0, (weight * values).sum(-1) / total, 0.0)


def weight_metrics(weight: Tensor) -> dict[str, float]:
    """How far the rollouts are from the policy: the effective sample size is (sum w)^2 / sum w^2 of N (Kong 1992)."""
    squares = weight.square().sum()
    effective = torch.where(squares > 0, weight.sum().square() / squares, 0.0)
    return {"importance_weight_mean": float(weight.mean()), "effective_sample_fraction": float(effective) / len(weight)}


def _key(name: str) -> int:
    """A number for a trajectory's id that float64 holds exactly."""
    return xxhash.xxh3_64_intdigest(name.encode()) >> 12
