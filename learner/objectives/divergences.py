"""Divergences between the occupancy measures of data and model, by their concave functions phi.

Convention: divergence = sup_r E_data[phi(r)] - E_model[r] (Cundy & Ermon, arXiv 2306.05426, and Garg et al., IQ-Learn,
arXiv 2106.12142). Every phi here has phi(0) = 0 and phi'(0) = 1, so it is written as phi(x) = x - penalty(x) with a
convex penalty that vanishes to second order at 0: the linear part turns into log-likelihood (the value terms
telescope), the penalty is what the divergence adds to it. The penalties below are written without the difference
x - phi(x) where that would cancel in float32.

Some phi are defined for x > low only. From low + margin downwards they go on by their tangent: that keeps them
concave and keeps a gradient back into the domain, which clamping would lose for ever. Which of the two holds is chosen
element by element, so that the tangent, whose slope grows as margin^-2, has no part in a value or a gradient inside.

Values are computed in float64, whatever the type of x: float32 cannot tell low + margin from low at a margin of 1e-8,
and loses the digits of 2 - exp(-x) near the end of the domain of js. There are as many of them as actions.

Total variation is not among them. Its phi is r where |r| <= 1/2 on data *and* model samples, a bound and not a
penalty: while the bound is inactive the loss is exactly maximum likelihood, and clipping on the data alone collapses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Domain:
    """x > low. penalty_slope: derivative of the penalty at a number of the domain."""

    low: float
    penalty_slope: Callable[[float], float]


@dataclass(frozen=True)
class Divergence:
    """A member of the family.

    penalty_inside: x - phi(x) on the domain, elementwise. domain: None = every number. penalises_rollouts: the
    reference is the half-half mixture of data and model, so that the squared residual of the rollouts is penalised too.
    """

    penalty_inside: Callable[[Tensor], Tensor]
    domain: Domain | None = None
    penalises_rollouts: bool = False

    def penalty(self, x: Tensor, margin: float) -> Tensor:
        """x - phi(x), elementwise; by the tangent below low + margin."""
        return self._penalty(x.double(), margin).to(x.dtype)

    def phi(self, x: Tensor, margin: float) -> Tensor:
        """phi(x), elementwise; by the tangent below low + margin."""
        return (x.double() - self._penalty(x.double(), margin)).to(x.dtype)

    def outside(self, x: Tensor, margin: float) -> Tensor:
        """Where the tangent is in force: x < low + margin; nowhere for a phi that is defined everywhere."""
        if self.domain is None:
            return torch.zeros_like(x, dtype=torch.bool)
        return x.double() < self.domain.low + margin

    def _penalty(self, x: Tensor, margin: float) -> Tensor:
        if self.domain is None:
            return self.penalty_inside(x)
        joint = self.domain.low + margin
        is_outside = self.outside(x, margin)
        inside = self.penalty_inside(torch.where(is_outside, joint, x))
        return torch.where(is_outside, inside + self.domain.penalty_slope(joint) * (x - joint), inside)


DIVERGENCES = {
    # phi(x) = x - x^2 / 4, all x: E_data[(rho_model / rho_data - 1)^2]
    "chi2_mixture": Divergence(lambda x: x.square() / 4, penalises_rollouts=True),
    "chi2": Divergence(lambda x: x.square() / 4),
    # phi(x) = log(1 + x), x > -1: KL(data || model). The textbook 1 + log x is the same shifted, but not defined at
    # ordinary initial logits.
    "kl": Divergence(lambda x: x - torch.log1p(x), Domain(-1.0, lambda x: x / (1.0 + x))),
    # phi(x) = 1 - exp(-x), all x: KL(model || data)
    "reverse_kl": Divergence(lambda x: torch.expm1(-x) + x),
    # phi(x) = log(2 - exp(-x)), x > -log 2: 2 JS(data, model), JS being the mean of both KL to the half-half mixture
    "js": Divergence(
        lambda x: x - torch.log1p(-torch.expm1(-x)),
        Domain(-math.log(2.0), lambda x: 1.0 - math.exp(-x) / (2.0 - math.exp(-x))),
    ),
    # phi(x) = x / (1 + x), x > -1: squared Hellinger, sum (sqrt rho_data - sqrt rho_model)^2
    "hellinger": Divergence(lambda x: x.square() / (1.0 + x), Domain(-1.0, lambda x: 1.0 - 1.0 / (1.0 + x) ** 2)),
    # phi(x) = x, all x: the collapsed loss is discounted maximum likelihood
    "mle": Divergence(torch.zeros_like),
}
"""By the name that `SequenceMatchSettings.divergence` gives."""
