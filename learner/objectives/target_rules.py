"""Methods that bring the policy to a target p = P / Z, P(x) = a(x) prod_i b_i(x) exp(sum_j lambda_j phi_j(x)).

a is the policy at the start of the stage. Pointwise constraints b_i (0 or 1) hold for every rollout of the target,
distributional ones are means: lambda is fitted so that E_p[phi_j] is what was asked for (Khalifa et al. 2021, arXiv
2012.11635; Korbak et al. 2022, arXiv 2206.00761; f-DPG: Go et al. 2023, arXiv 2302.08215). A policy cannot change its
prompts, so each prompt c has a target of its own, p_c = P / Z_c, the divergence is a mean over prompts, and so is the
mean of a feature (conditional DPG: Korbak et al. 2021, arXiv 2112.00791). Directions of ascent, with Z the mean of Z_c:

dpg, gdc   E_mu[(P / mu) (Z / Z_c) grad log pi]
gdc_pp     E_mu[((P / mu) (Z / Z_c) - Z pi / mu) grad log pi]: a baseline of Z alone would be biased with stale actors
f_dpg      -E_mu[(pi / mu) (f'(pi / p_c) - B) grad log pi], B the mean of the other rollouts

With one prompt Z / Z_c is 1. `learner.objectives.target_estimates` estimates Z_c and lambda. `dpg` and `gdc` agree for
any mu. They differ in the policy that acts: with a KL-adaptive proposal the actors keep their weights until the current
ones are nearer to the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.objectives.score_function import (
    Rollouts,
    ScoreFunction,
    Weighed,
    leave_one_out_mean,
    weight_metrics,
    weighted_mean,
)
from learner.objectives.target_estimates import PartitionFunction, fit_moments, prompt_weights
from learner.settings.objectives import ConstraintSettings, FDivergence, FDpgSettings, GdcSettings, TargetSettings


@dataclass(frozen=True)
class Densities:
    """[N] of each rollout: log P (-inf where a pointwise constraint is broken), log pi, log mu, and estimates of Z of
    its prompt and of the mean of Z over all prompts that do not depend on the rollout."""

    log_target: Tensor
    log_pi: Tensor
    log_mu: Tensor
    z: Tensor
    z_mean: Tensor

    @property
    def ratio(self) -> Tensor:
        """[N] P / mu."""
        return (self.log_target - self.log_mu).exp()

    @property
    def prompt_weight(self) -> Tensor:
        """[N] mean of Z over Z of the prompt: times this the ratio is a mean over prompts of p_c / mu, up to a common
        factor."""
        return prompt_weights(self.z, self.z_mean)

    @property
    def weight(self) -> Tensor:
        """[N] pi / mu."""
        return (self.log_pi - self.log_mu).exp()


def advantages(settings: TargetSettings, densities: Densities) -> Tensor:
    """[N] coefficients c of rollouts whose target is known."""
    if not isinstance(settings, FDpgSettings):
        gradient = densities.ratio * densities.prompt_weight
        return gradient - densities.z_mean * densities.weight if settings.name == "gdc_pp" else gradient
    known = densities.z > 0  # without an estimate of Z a rollout has no weight
    log_t = torch.where(known, densities.log_pi + densities.z.log() - densities.log_target, 0.0)
    slope = F_SLOPES[settings.divergence](log_t)
    weight = densities.weight * known
    return -weight * (slope - leave_one_out_mean(slope, weight))


def kl_to_target(densities: Densities) -> float:
    """Mean over prompts of KL(p_c, pi) = E_{p_c}[log(P / pi)] - log Z_c, by rollouts of mu; 0 where all have P = 0.
    Self-normalized: Z_c is the mean of P / mu over these rollouts, divided by the weight of the prompt."""
    ratio, weight = densities.ratio, densities.prompt_weight
    z = ratio.mean()
    if not z > 0:
        return 0.0
    excess = torch.where(ratio > 0, ratio * weight * (densities.log_target - densities.log_pi), 0.0)
    return float(excess.mean() / (ratio * weight).mean() - (z / weight).log().mean())


F_SLOPES: dict[FDivergence, Callable[[Tensor], Tensor]] = {
    "kl": lambda log_t: -(-log_t).exp(),
    "reverse_kl": lambda log_t: 1 + log_t,
    "tv": lambda log_t: log_t.sign() / 2,
    "js": lambda log_t: math.log(2.0) - torch.nn.functional.softplus(-log_t),
    "chi2": lambda log_t: 1 - (-2 * log_t).exp(),
    "reverse_chi2": lambda log_t: 2 * torch.expm1(log_t),
}
"""f'(t) of log t, t = pi / p: of KL(p, pi), KL(pi, p), total variation, Jensen-Shannon, chi2(p, pi), chi2(pi, p)."""


class TargetAscent(ScoreFunction):
    """Fits lambda first, with zero coefficients; then the coefficients are the advantages."""

    settings: TargetSettings

    def __post_init__(self) -> None:
        self._column = {each: self.features.index(each.feature) for each in self.settings.constraints}
        self._pointwise = [each for each in self.settings.constraints if each.target is None]
        self._moments = [each for each in self.settings.constraints if each.target is not None]
        self._adaptive = isinstance(self.settings, GdcSettings) and self.settings.proposal == "kl_adaptive"
        self._z = PartitionFunction()
        # Of log pi over log mu under p_c, times Z; since the last call of `should_publish`.
        self._gain = torch.zeros(1, dtype=torch.float64)
        self._weight = None if self._moments else torch.zeros(0, dtype=torch.float64)
        # Columns: key, context, trajectory a b / mu, features.
        self._samples = torch.zeros(0, 3 + len(self._moments), dtype=torch.float64)

    def weigh(self, rollouts: Rollouts) -> Weighed:
        """Coefficients; zero while lambda is not known. ValueError: rollouts lack a feature, or one of a pointwise
        constraint is neither 0 nor 1."""
        self._check(rollouts)
        moments = weighted_mean(rollouts.features.T, rollouts.weight)
        goals = {column: 1.0 if each.target is None else each.target for each, column in self._column.items()}
        gaps = [abs(float(moments[column]) - goal) for column, goal in goals.items()]
        log_base = self._log_base(rollouts)
        metrics = {
            "constraint_gap": max(gaps),
            "unsatisfied_fraction": float((log_base == -torch.inf).double().mean()),
            "kl_base": float(weighted_mean(rollouts.log_pi - rollouts.log_base, rollouts.weight)),
            **weight_metrics(rollouts.weight),
        }
        if self._weight is None:
            unknown = {"fitting": 1.0, "z": 0.0, "kl_target": 0.0}
            return Weighed(torch.zeros_like(rollouts.log_pi), metrics | unknown)
        densities = self._densities(rollouts)
        metrics |= {"fitting": 0.0, "z": float(densities.ratio.mean()), "kl_target": kl_to_target(densities)}
        return Weighed(advantages(self.settings, densities), metrics)

    def learn(self, rollouts: Rollouts) -> None:
        """Collect samples until lambda can be fitted (raises as `fit_moments`); then update Z and the gain that decides
        about publication."""
        if self._weight is None:
            self._collect(rollouts)
            return
        densities = self._densities(rollouts)
        self._z.add(rollouts.context, densities.ratio)
        counts = densities.ratio * densities.prompt_weight
        self._gain += (counts * (densities.log_pi - densities.log_mu)).sum()

    def should_publish(self) -> bool:
        """Whether KL(p, pi) < KL(p, mu), by the steps since the last call.

        Both are -log Z_c + E_{p_c}[log(P / .)], a mean over prompts, so the sign of E_mu[(P / mu) / Z_c log(pi / mu)]
        decides.
        """
        if self._weight is None:
            return False  # the weights have not changed
        nearer = not self._adaptive or float(self._gain) > 0
        self._gain = torch.zeros_like(self._gain)
        return nearer

    def state(self) -> dict[str, Tensor]:
        """Lambda, or the samples for it; Z."""
        fitted = {} if self._weight is None else {"lambda": self._weight}
        return {**fitted, "samples": self._samples, "gain": self._gain, **self._z.state()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._weight, self._samples, self._gain = state.get("lambda"), state["samples"], state["gain"]
        self._z.load_state(state)

    def _check(self, rollouts: Rollouts) -> None:
        present = rollouts.features.shape[1]
        for each, column in self._column.items():
            if column >= present:
                raise ValueError(f"rollouts have {present} features, and no {each.feature}: set scoring.features")
        for each in self._pointwise:
            values = rollouts.features[:, self._column[each]]
            if not ((values == 0) | (values == 1)).all():
                raise ValueError(
                    f"feature {each.feature} is {float(values[(values != 0) & (values != 1)][0]):g} in a rollout, and "
                    "a pointwise constraint is met (1) or not (0): give it a target, or another feature"
                )

    def _log_base(self, rollouts: Rollouts) -> Tensor:
        """[N] trajectory a b: without the distributional constraints."""
        satisfied = (self._features_of(rollouts, self._pointwise) == 1).all(1)
        return rollouts.log_base.masked_fill(~satisfied, -torch.inf)

    def _features_of(self, rollouts: Rollouts, constraints: list[ConstraintSettings]) -> Tensor:
        return rollouts.features[:, [self._column[each] for each in constraints]]

    def _densities(self, rollouts: Rollouts) -> Densities:
        assert self._weight is not None
        log_target = self._log_base(rollouts) + self._features_of(rollouts, self._moments) @ self._weight
        z, z_mean = self._z.leave_one_out(rollouts.context, (log_target - rollouts.log_mu).exp())
        return Densities(log_target, rollouts.log_pi, rollouts.log_mu, z, z_mean)

    def _collect(self, rollouts: Rollouts) -> None:
        log_weight = self._log_base(rollouts) - rollouts.log_mu
        plain = torch.stack([rollouts.key.double(), rollouts.context.double(), log_weight], dim=1)
        new = torch.cat([plain, self._features_of(rollouts, self._moments)], dim=1)
        new = new[~torch.isin(new[:, 0], self._samples[:, 0])]  # two samples may hold the same rollout
        self._samples = torch.cat([self._samples, new])
        if len(self._samples) < self.settings.fit_samples:
            return
        targets = [each.target for each in self._moments if each.target is not None]
        self._weight = fit_moments(
            self._samples[:, 3:],
            self._samples[:, 2],
            self._samples[:, 1].long(),
            torch.tensor(targets, dtype=torch.float64),
            [each.feature for each in self._moments],
        )
        self._samples = self._samples[:0]
