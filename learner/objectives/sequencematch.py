"""The SequenceMatch loss (Cundy & Ermon, arXiv 2306.05426): match the occupancy measures of data and model.

With r_t = Q(s_t, a_t) - gamma V(s_{t+1}), a data trajectory s_0..s_N and a model trajectory u_0..u_M, both starting at
the end of a prompt and ending in the absorbing `<eos>` state, maximize

    J = sum_{t<N} gamma^t phi(alpha r_t) / alpha + gamma^N phi(alpha (1-gamma) V(s_N)) / (alpha (1-gamma))
        - sum_{t<N} gamma^t/2 [V(s_t) - gamma V(s_{t+1})] - gamma^N/2 V(s_N)
        - sum_{t<M} gamma^t/2 [V(u_t) - gamma V(u_{t+1})] - gamma^M/2 V(u_M).

The `<eos>` terms are the closed form of the endless loop there. A truncated trajectory has no absorbing state: it
keeps the value tails, which are exact for any policy, and its phi tail becomes the tangent gamma^N V(s_N);
then J holds the observed terms only.

The value sums telescope to V at the start. With phi(x) = x - penalty(x) and a shared start, J is

    sum_t gamma^t log p(a_t|s_t)
        - 1/alpha [ sum_t gamma^t penalty(alpha r_t) + gamma^N/(1-gamma) penalty(alpha (1-gamma) V(s_N)) ]

(no `<eos>` part if truncated): the *collapsed* estimator, equal in expectation, with less variance. Model
trajectories cancel out of it, except for the penalty that a mixture divergence puts on them: c E_model[(alpha r)^2],
c = mixture_scale / (4 alpha) for the half-half mixture; 1 with mixture_scale=paper.

The *uniform* estimator replaces every gamma^t and gamma^N of the sums as the paper prints them by 1 and keeps gamma in
r and in the differences of values, as IQ-Learn (Garg et al., arXiv 2106.12142) samples its states. Late actions weigh
as much as early ones. The sums of values no longer telescope, so the estimate is biased by O((1-gamma) N). The `<eos>`
terms stay closed forms, since an endless loop of weight 1 has no sum. At a fixed length the limit gamma -> 1 is the
same for both.

J is a mean over trajectories. It is multiplied by data trajectories / data actions of the global batch, a constant, so
that its scale is per action, as that of behavior cloning is.

Divergence = sup_r E_data[phi(r)] - E_model[r] (as in IQ-Learn). Every concave phi here has phi(0) = 0 and phi'(0) = 1,
so it is written as phi(x) = x - penalty(x) with a convex penalty that vanishes to second order at 0: the linear part
turns into log-likelihood, and the divergence adds the penalty. Total variation is not offered. Its phi is
r where |r| <= 1/2 on data *and* model samples, a bound and not a penalty: while the bound is inactive the loss is
exactly maximum likelihood, and clipping on the data alone collapses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from learner.objectives.base import (
    BatchCounts,
    EvaluatedTrajectories,
    Metrics,
    Objective,
    OutsideDomainError,
    cross_entropy,
    data_metrics,
    rollout_metrics,
)
from learner.settings.objectives import SequenceMatchSettings


@dataclass(frozen=True)
class Divergence:
    """A divergence by the penalty of its phi.

    penalty_inside: x - phi(x) where phi is defined, elementwise, without that difference where it would cancel.
    low, penalty_slope: phi is defined for x > low only; derivative of the penalty at a number there.
    penalizes_rollouts: the reference is the half-half mixture of data and model, so that the squared residual of the
        rollouts is penalized too.

    Below low + margin the tangent replaces phi. So phi stays concave, and its gradient leads back into the domain;
    clamping would have no gradient there. The choice is made per element, so that the tangent, whose slope grows as
    margin^-2, affects no value and no gradient inside the domain.

    Values are computed in float64, whatever the type of x: float32 cannot tell low + margin from low at a margin of
    1e-8, and loses the digits of 2 - exp(-x) near the end of the domain of js. There are as many as actions.
    """

    penalty_inside: Callable[[Tensor], Tensor]
    low: float = -math.inf
    penalty_slope: Callable[[float], float] | None = None
    penalizes_rollouts: bool = False

    def penalty(self, x: Tensor, margin: float) -> Tensor:
        """x - phi(x), elementwise; by the tangent below low + margin."""
        return self._penalty(x.double(), margin).to(x.dtype)

    def phi(self, x: Tensor, margin: float) -> Tensor:
        """phi(x), elementwise; by the tangent below low + margin."""
        return (x.double() - self._penalty(x.double(), margin)).to(x.dtype)

    def outside(self, x: Tensor, margin: float) -> Tensor:
        """Where the tangent replaces phi: x < low + margin."""
        return x.double() < self.low + margin

    def _penalty(self, x: Tensor, margin: float) -> Tensor:
        if self.penalty_slope is None:
            return self.penalty_inside(x)
        joint = self.low + margin
        is_outside = self.outside(x, margin)
        inside = self.penalty_inside(torch.where(is_outside, joint, x))
        return torch.where(is_outside, inside + self.penalty_slope(joint) * (x - joint), inside)


DIVERGENCES = {
    # phi(x) = x - x^2 / 4, all x: E_data[(rho_model / rho_data - 1)^2]
    "chi2_mixture": Divergence(lambda x: x.square() / 4, penalizes_rollouts=True),
    "chi2": Divergence(lambda x: x.square() / 4),
    # phi(x) = log(1 + x), x > -1: KL(data || model). The textbook's 1 + log x is the same, shifted by 1, but is not
    # defined at ordinary initial logits.
    "kl": Divergence(lambda x: x - torch.log1p(x), -1.0, lambda x: x / (1.0 + x)),
    # phi(x) = 1 - exp(-x), all x: KL(model || data)
    "reverse_kl": Divergence(lambda x: torch.expm1(-x) + x),
    # phi(x) = log(2 - exp(-x)), x > -log 2: 2 JS(data, model), JS being the mean of both KL to the half-half mixture
    "js": Divergence(
        lambda x: x - torch.log1p(-torch.expm1(-x)),
        -math.log(2.0),
        lambda x: 1.0 - math.exp(-x) / (2.0 - math.exp(-x)),
    ),
    # phi(x) = x / (1 + x), x > -1: squared Hellinger, sum (sqrt rho_data - sqrt rho_model)^2
    "hellinger": Divergence(lambda x: x.square() / (1.0 + x), -1.0, lambda x: 1.0 - 1.0 / (1.0 + x) ** 2),
    # phi(x) = x, all x: the collapsed loss is discounted maximum likelihood
    "mle": Divergence(torch.zeros_like),
}
"""Keys: values of `SequenceMatchSettings.divergence`."""


class SequenceMatch(Objective):
    """beta * behavior cloning + (1 - beta) * (-J), with beta annealed linearly."""

    settings: SequenceMatchSettings

    def __post_init__(self) -> None:
        settings = self.settings
        self.divergence = DIVERGENCES[settings.divergence]
        self.margin = settings.domain_margin
        scale = settings.mixture_scale
        self.rollout_penalty_coefficient = 1.0 if scale == "paper" else scale / (4.0 * settings.alpha)

    def beta(self, step: int) -> float:
        """Weight of behavior cloning at optimizer step `step` of this objective."""
        done = min(step / self.settings.bc_weight_steps, 1.0)
        return self.settings.bc_weight_start + (self.settings.bc_weight_end - self.settings.bc_weight_start) * done

    def data_loss(self, data: EvaluatedTrajectories, step: int) -> tuple[Tensor, Metrics]:
        """beta * cross-entropy + (1 - beta) * the terms of -J that stand under E_data."""
        per_action = data.counts.trajectories_per_action
        penalized = partial(self.divergence.penalty, margin=self.margin)
        penalty = data.mean_over_trajectories(self._penalty_sum(data, penalized)) / self.settings.alpha * per_action
        if self.settings.estimator == "collapsed":
            weight = self._weight(data.tree.actions.time, data)
            loss_sequencematch = penalty - data.mean_over_trajectories(weight * data.values.log_prob) * per_action
        else:
            reward = data.mean_over_trajectories(self._phi_sum(data))
            values = data.mean_over_trajectories(self._value_sum(data))
            loss_sequencematch = (values / 2 - reward) * per_action
        beta = self.beta(step)
        loss = beta * cross_entropy(data) + (1.0 - beta) * loss_sequencematch
        metrics = data_metrics(
            data,
            loss,
            loss_sequencematch=loss_sequencematch,
            penalty_data=penalty,
            beta=loss.new_tensor(beta * data.fraction),
            **self._residual_metrics(data, ""),
        )
        if self.divergence.penalty_slope is not None:
            metrics["phi_outside_fraction"] = self._outside_fraction(data)
        return loss, metrics

    def rollout_loss(
        self, rollouts: EvaluatedTrajectories, data_counts: BatchCounts, step: int
    ) -> tuple[Tensor, Metrics]:
        """(1 - beta) * the terms of -J that stand under E_model."""
        if not self.settings.needs_rollouts:
            return super().rollout_loss(rollouts, data_counts, step)
        per_action = data_counts.trajectories_per_action
        loss_sequencematch = rollouts.values.q.new_zeros(())
        metrics: Metrics = {}
        if self.settings.estimator != "collapsed":
            values = rollouts.mean_over_trajectories(self._value_sum(rollouts))
            loss_sequencematch = loss_sequencematch + values / 2 * per_action
        if self.divergence.penalizes_rollouts:
            squared = rollouts.mean_over_trajectories(self._penalty_sum(rollouts, torch.square))
            penalty = self.rollout_penalty_coefficient * squared * per_action
            loss_sequencematch = loss_sequencematch + penalty
            metrics["penalty_model"] = penalty
        loss = (1.0 - self.beta(step)) * loss_sequencematch
        metrics |= {"loss_sequencematch": loss_sequencematch, **self._residual_metrics(rollouts, "_model")}
        return loss, rollout_metrics(rollouts, loss, **metrics)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def priorities(self, rollouts: EvaluatedTrajectories) -> Tensor:
        """[L] mean of the soft-Bellman residuals |r| over the actions of each trajectory; 0 for one without actions.
        They replace the TD errors of Q-learning, by which Schaul et al. 2016 (arXiv 1511.05952) prioritize."""
        trajectories = rollouts.tree.trajectories
        return trajectories.sum_of_actions(self._residual(rollouts).abs()) / trajectories.length.clamp(min=1)

    def check(self, metrics: Mapping[str, Tensor], step: int) -> None:
        """With `domain_policy=stop`, raise OutsideDomainError once alpha r left the domain of phi."""
        if self.settings.domain_policy != "stop":
            return
        share = float(metrics["phi_outside_fraction"])
        if share > 0.0:
            low = self.divergence.low
            raise OutsideDomainError(
                f"step {step}: {100 * share:.2g} % of alpha r on the expert batch left the domain of divergence "
                f"{self.settings.divergence} (below {low + self.margin:.3g}; phi ends at "
                f"{low:.3g}). Lower alpha, clone behavior for longer before this stage, choose a divergence "
                "that has none (chi2_mixture, chi2, reverse_kl), or set domain_policy=project to go on by the tangent"
            )

    def _residual(self, trajectories: EvaluatedTrajectories) -> Tensor:
        """[A] r = Q(s, a) - gamma V(s')."""
        return trajectories.values.q - self.settings.gamma * trajectories.values.v_next

    def _arguments(self, trajectories: EvaluatedTrajectories) -> tuple[Tensor, Tensor]:
        """[A] alpha r of each action, and [L] alpha (1 - gamma) V(s_N) of each `<eos>`."""
        alpha, gamma = self.settings.alpha, self.settings.gamma
        return alpha * self._residual(trajectories), alpha * (1.0 - gamma) * trajectories.values.v_final

    def _weight(self, times: Tensor, trajectories: EvaluatedTrajectories) -> Tensor:
        """gamma^times (1 in the uniform estimator), in the type of the values."""
        times = times.to(trajectories.values.q.dtype)
        return torch.ones_like(times) if self.settings.estimator == "uniform" else self.settings.gamma**times

    def _penalty_sum(self, trajectories: EvaluatedTrajectories, penalty: Callable[[Tensor], Tensor]) -> Tensor:
        """[A + L] terms of sum_t gamma^t penalty(alpha r_t) and of its `<eos>` part (none if truncated)."""
        observed, absorbed = (penalty(argument) for argument in self._arguments(trajectories))
        absorbed = (absorbed / (1.0 - self.settings.gamma)).masked_fill(trajectories.tree.trajectories.truncated, 0.0)
        return self._discounted(trajectories, observed, absorbed)

    def _phi_sum(self, trajectories: EvaluatedTrajectories) -> Tensor:
        """[A + L] terms of sum_t gamma^t phi(alpha r_t) / alpha and of its tail."""
        alpha, values = self.settings.alpha, trajectories.values
        observed, absorbed = (self.divergence.phi(each, self.margin) for each in self._arguments(trajectories))
        absorbed = absorbed / (alpha * (1.0 - self.settings.gamma))
        tail = torch.where(trajectories.tree.trajectories.truncated, values.v_final, absorbed)
        return self._discounted(trajectories, observed / alpha, tail)

    def _value_sum(self, trajectories: EvaluatedTrajectories) -> Tensor:
        """[A + L] terms of sum_t gamma^t [V(s_t) - gamma V(s_{t+1})] and of its tail gamma^N V(s_N)."""
        values = trajectories.values
        return self._discounted(trajectories, values.v - self.settings.gamma * values.v_next, values.v_final)

    def _discounted(self, trajectories: EvaluatedTrajectories, observed: Tensor, tail: Tensor) -> Tensor:
        """[A + L] gamma^t observed_t of every action, and gamma^N tail of every trajectory of N actions."""
        weights = self._weight(
            torch.cat([trajectories.tree.actions.time, trajectories.tree.trajectories.length]), trajectories
        )
        return weights * torch.cat([observed, tail])

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _outside_fraction(self, trajectories: EvaluatedTrajectories) -> Tensor:
        """This call's part of the fraction of arguments of phi (of actions and `<eos>`) outside its domain."""
        observed, absorbed = (self.divergence.outside(each, self.margin) for each in self._arguments(trajectories))
        num_outside = (observed.sum() + (absorbed & ~trajectories.tree.trajectories.truncated).sum()).to(
            trajectories.values.q.dtype
        )
        counts = trajectories.counts
        return num_outside / max(counts.actions + counts.trajectories - counts.truncated_trajectories, 1)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _residual_metrics(self, trajectories: EvaluatedTrajectories, suffix: str) -> Metrics:
        """The mixture bounds |r| by 2 / alpha at its optimum (LS-IQ, arXiv 2303.00599)."""
        residual = self._residual(trajectories)
        magnitude = torch.cat([residual.abs(), residual.new_zeros(1)])  # a batch of empty trajectories has no maximum
        beyond = (residual.abs() > 2.0 / self.settings.alpha).to(residual.dtype)
        return {
            f"r_mean{suffix}": trajectories.mean_over_actions(residual),
            f"r{suffix}_max_abs": magnitude.max(),
            f"r_fraction_beyond_bound{suffix}": trajectories.mean_over_actions(beyond),
        }
