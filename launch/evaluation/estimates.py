"""Numbers with their errors, and differences of numbers that were measured on the same examples."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error over `count` cases. No value without a case; no error of a mean of one.

    Shares have the binomial error sqrt(p (1 - p) / n), which takes the cases as independent: for tokens of the same
    answer that is optimistic.

    influence: [N] by how much each held-out example moves the value (the linear part, summing to 0), where the value is
        one of examples. Two values of the same examples differ by less than their errors say: see `difference`.
    resampled: [R] the value on bootstrap draws of the examples, where it is one of all examples at once; the draws are
        those of every number over as many examples with the same seed.
    """

    value: float | None
    standard_error: float | None
    count: int
    influence: Float64 | None = field(default=None, compare=False, repr=False)
    resampled: Float64 | None = field(default=None, compare=False, repr=False)

    @classmethod
    def share(cls, cases: Bool, example: Int64 | None = None, num_examples: int = 0) -> Estimate:
        """How often `cases` [n] are true.

        example: [n] the example that each case is of, if the cases are not the examples themselves.
        """
        if len(cases) == 0:
            return cls(None, None, 0)
        value = float(np.mean(cases))
        error = float(np.sqrt(value * (1 - value) / len(cases)))
        influence: Float64 = (cases - value) / len(cases)
        if example is not None:
            influence = np.bincount(example, influence, minlength=num_examples).astype(np.float64)
        return cls(value, error, len(cases), influence)

    @classmethod
    def mean(cls, values: npt.NDArray[np.int64 | np.float64], valid: Bool | None = None) -> Estimate:
        """Mean of `values` [N], one of each example, over those that are `valid` (by default all)."""
        valid = np.ones(len(values), dtype=np.bool_) if valid is None else valid
        return cls.ratio(np.where(valid, values, 0.0), valid.astype(np.float64), count=int(valid.sum()))

    @classmethod
    def ratio(cls, numerators: Float64, denominators: Float64, count: int | None = None) -> Estimate:
        """Ratio of sums over examples, with its linearised standard error (Cochran, Sampling Techniques, 2.11).

        count: examples that have a part in it, if not all of the [N] do.
        """
        count, total = len(numerators) if count is None else count, float(denominators.sum())
        if total == 0.0:
            return cls(None, None, count)
        value = float(numerators.sum()) / total
        return cls.linear(value, (numerators - value * denominators) / total, count)

    @classmethod
    def linear(cls, value: float, influence: Float64, count: int) -> Estimate:
        """A value whose error follows from the influence [N] of its examples, `count` of which have a part in it."""
        if count < 2:
            return cls(value, None, count, influence)
        return cls(value, float(np.sqrt(count / (count - 1) * np.square(influence).sum())), count, influence)


def difference(number: Estimate, baseline: Estimate) -> Estimate | None:
    """`number` - `baseline` with the error of the paired difference; None where they are not of the same examples.

    What an example adds to both cancels, so the error is smaller than that of independent numbers.
    """
    if number.value is None or baseline.value is None:
        return None
    if number.resampled is not None and baseline.resampled is not None and number.count == baseline.count:
        spread = float(np.std(number.resampled - baseline.resampled, ddof=1))
        return Estimate(number.value - baseline.value, spread, number.count)
    if number.influence is None or baseline.influence is None:
        return None
    if len(number.influence) != len(baseline.influence):
        return None
    return Estimate.linear(
        number.value - baseline.value, number.influence - baseline.influence, count=len(number.influence)
    )


def is_within_noise(change: Estimate) -> bool:
    """Whether a difference is smaller than twice its standard error, or has none."""
    assert change.value is not None
    return change.standard_error is None or abs(change.value) <= 2.0 * change.standard_error
