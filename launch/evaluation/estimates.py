"""Numbers with their errors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bool = npt.NDArray[np.bool_]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error over `count` cases. No value without a case; no error of a mean of one.

    Shares have the binomial error sqrt(p (1 - p) / n), which takes the cases as independent: for tokens of the same
    answer that is optimistic.
    """

    value: float | None
    standard_error: float | None
    count: int

    @classmethod
    def share(cls, cases: Bool) -> Estimate:
        """How often `cases` [n] are true."""
        if len(cases) == 0:
            return cls(None, None, 0)
        value = float(np.mean(cases))
        return cls(value, float(np.sqrt(value * (1 - value) / len(cases))), len(cases))

    @classmethod
    def mean(cls, values: npt.NDArray[np.int64]) -> Estimate:
        """Mean of `values` [n]."""
        if len(values) == 0:
            return cls(None, None, 0)
        error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
        return cls(float(np.mean(values)), error, len(values))


def ratio(numerators: Float64, denominators: Float64) -> Estimate:
    """Ratio of sums over n cases, with its linearised standard error (Cochran, Sampling Techniques, 2.11)."""
    count, total = len(numerators), float(denominators.sum())
    if total == 0.0:
        return Estimate(None, None, count)
    value = float(numerators.sum()) / total
    if count < 2:
        return Estimate(value, None, count)
    residuals = numerators - value * denominators
    error = float(np.sqrt(count / (count - 1) * np.square(residuals).sum()) / total)
    return Estimate(value, error, count)


def mean(values: Float64) -> Estimate:
    """Mean of `values` [n]."""
    return ratio(values, np.ones(len(values)))
