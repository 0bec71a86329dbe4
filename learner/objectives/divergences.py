"""Divergences between the occupancy measures of data and model, by their concave functions phi.

Convention: divergence = sup_r E_data[phi(r)] - E_model[r]. Every phi here has phi(0) = 0 and phi'(0) = 1, so
it is written as phi(x) = x - penalty(x) with a convex penalty that vanishes to second order at 0: the linear
part turns into log-likelihood (the value terms telescope), the penalty is what the divergence adds to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """A member of the family.

    penalty: convex, elementwise, x - phi(x). penalises_rollouts: the reference is the half-half mixture of
    data and model, so that the squared residual of the rollouts is penalised too.
    """

    penalty: Callable[[Tensor], Tensor]
    penalises_rollouts: bool = False

    def phi(self, x: Tensor) -> Tensor:
        """phi(x) = x - penalty(x), elementwise."""
        return x - self.penalty(x)


def chi2_penalty(x: Tensor) -> Tensor:
    """x^2 / 4: phi of E_data[(rho_model / rho_data - 1)^2]."""
    return x.square() / 4


DIVERGENCES = {
    "chi2": Divergence(chi2_penalty),
    "chi2_mixture": Divergence(chi2_penalty, penalises_rollouts=True),
}
"""By the name that `SequenceMatchSettings.divergence` gives."""
