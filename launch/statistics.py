"""Measured numbers with their errors, and the differences between them.

Every verdict of "within noise" comes from this module: that of an evaluation, of a report and of a comparison.
scipy is imported inside the functions, because that takes a second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

CONFIDENCE = 0.95
MIN_SEEDS = 3
"""Fewer seeds say nothing about the spread over seeds."""

_ROUNDING = 1e-12  # relative: numbers that differ by less are the same number
_Z = 1.959963984540054  # the normal distribution's quantile of (1 + CONFIDENCE) / 2


@dataclass(frozen=True)
class Interval:
    """A number with the ends of its 95 % interval, which are None where nothing says how uncertain it is."""

    value: float
    low: float | None
    high: float | None

    @property
    def half_width(self) -> float | None:
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error over `count` cases. No value without a case; no error of a mean of one.

    influence: [N] by how much each held-out example moves the value (the linear part, summing to 0), where the value is
        one of examples. resampled: [R] the value on bootstrap samples of the examples, where it is one of all examples
        at once; the samples are the same for every number over as many examples with the same seed. No file has either.
    """

    __pydantic_config__ = ConfigDict(arbitrary_types_allowed=True)

    value: float | None
    standard_error: float | None
    count: Annotated[int, Field(alias="n")]
    influence: Annotated[Float64 | None, Field(exclude=True)] = field(default=None, compare=False, repr=False)
    resampled: Annotated[Float64 | None, Field(exclude=True)] = field(default=None, compare=False, repr=False)

    @classmethod
    def fraction(cls, cases: Bool, example: Int64 | None = None, num_examples: int = 0) -> Estimate:
        """How often `cases` [n] are true, with the binomial error, which takes the cases as independent.

        example: [n] the example that each case belongs to, if the cases are not the examples themselves.
        """
        if len(cases) == 0:
            return cls(None, None, 0)
        value = float(np.mean(cases))
        influence: Float64 = (cases - value) / len(cases)
        if example is not None:
            influence = np.bincount(example, influence, minlength=num_examples).astype(np.float64)
        return cls(value, math.sqrt(value * (1 - value) / len(cases)), len(cases), influence)

    @classmethod
    def mean(cls, values: npt.NDArray[np.int64 | np.float64], valid: Bool | None = None) -> Estimate:
        """Mean of `values` [N], one of each example, over those that are `valid` (by default all)."""
        valid = np.ones(len(values), dtype=np.bool_) if valid is None else valid
        return cls.ratio(np.where(valid, values, 0.0), valid.astype(np.float64), count=int(valid.sum()))

    @classmethod
    def ratio(cls, numerators: Float64, denominators: Float64, count: int | None = None) -> Estimate:
        """Ratio of sums over examples, with its linearized standard error (Cochran, Sampling Techniques, 2.11).

        count: examples that contribute to it, if not all of the [N] do.
        """
        count, total = len(numerators) if count is None else count, float(denominators.sum())
        if total == 0.0:
            return cls(None, None, count)
        value = float(numerators.sum()) / total
        return cls.linear(value, (numerators - value * denominators) / total, count)

    @classmethod
    def linear(cls, value: float, influence: Float64, count: int) -> Estimate:
        """A value whose error follows from the influence [N] of its examples, `count` of which contribute to it."""
        error = math.sqrt(count / (count - 1) * np.square(influence).sum()) if count > 1 else None
        return cls(value, error, count, influence)

    def interval(self) -> Interval | None:
        """The 95 % interval; None without a value.

        A value with the binomial error is a fraction and has Wilson's score interval, which is not empty at 0 and 1.
        Other values have value -+ 1.96 standard errors.
        """
        if self.value is None:
            return None
        if self.standard_error is None:
            return Interval(self.value, None, None)
        if 0.0 <= self.value <= 1.0 and self.count > 0:
            binomial = math.sqrt(self.value * (1 - self.value) / self.count)
            if math.isclose(self.standard_error, binomial, rel_tol=1e-6, abs_tol=1e-12):
                from scipy.stats import binomtest

                test = binomtest(round(self.value * self.count), self.count)
                ends = test.proportion_ci(CONFIDENCE, method="wilson")
                return Interval(self.value, min(self.value, float(ends.low)), max(self.value, float(ends.high)))
        half_width = _Z * self.standard_error
        return Interval(self.value, self.value - half_width, self.value + half_width)

    def to_json(self) -> dict[str, float | int | None]:
        """As `evaluation.json` and `compare.json` have it."""
        return {"value": self.value, "standard_error": self.standard_error, "n": self.count}


BySeed = Mapping[int, Estimate]


@dataclass(frozen=True)
class Difference(Interval):
    """A number minus the reference's, averaged over the seeds that have both.

    p_value: two-sided. adjusted_p_value: by Holm's method for the differences that were tested together. Both are None
    where nothing says how uncertain the numbers are. basis: what the uncertainty was taken from.
    """

    p_value: float | None
    adjusted_p_value: float | None
    basis: Literal["seeds", "examples"]
    num_seeds: int

    @property
    def within_noise(self) -> bool | None:
        """Whether chance explains it; None if unknown. For one difference alone: whether the interval holds 0."""
        return None if self.adjusted_p_value is None else self.adjusted_p_value > 1.0 - CONFIDENCE

    def to_json(self) -> dict[str, object]:
        """As `compare.json` has it."""
        names = ("half_width", "p_value", "adjusted_p_value", "basis", "num_seeds", "within_noise")
        return {"mean": self.value, **{name: getattr(self, name) for name in names}}


def change_by_example(number: Estimate, baseline: Estimate) -> Estimate | None:
    """`number` - `baseline` with the error of the paired difference; None where they are not of the same examples."""
    if number.value is None or baseline.value is None:
        return None
    value = number.value - baseline.value
    if number.resampled is not None and baseline.resampled is not None and number.count == baseline.count:
        return Estimate(value, float(np.std(number.resampled - baseline.resampled, ddof=1)), number.count)
    if number.influence is None or baseline.influence is None or len(number.influence) != len(baseline.influence):
        return None
    return Estimate.linear(value, number.influence - baseline.influence, count=len(number.influence))


def difference(number: Estimate, reference: Estimate, change: Estimate | None = None) -> Difference | None:
    """`number` - `reference` of a run each; None if one has no finite value. change: see `change_by_example`."""
    return difference_over_seeds({0: number}, {0: reference}, {} if change is None else {0: change})


def difference_over_seeds(numbers: BySeed, reference: BySeed, changes: BySeed) -> Difference | None:
    """`numbers` - `reference`, paired by seed; None if no seed has both.

    From `MIN_SEEDS` seeds on it has Student's interval over the paired differences. With fewer seeds, or where all
    differences are the same, it has the interval that the errors over the examples leave, which know nothing of other
    seeds. changes: by seed, the difference measured example by example. Without it, or if its error is 0, the two
    numbers count as independent, which is cautious.
    """
    seeds = [seed for seed in numbers if _has_value(numbers[seed]) and _has_value(reference.get(seed))]
    if not seeds:
        return None
    ours, theirs = (np.array([side[seed].value for seed in seeds]) for side in (numbers, reference))
    rounding = _ROUNDING * float(np.maximum(np.abs(ours), np.abs(theirs)).max())
    mean = float((ours - theirs).mean())
    if len(seeds) >= MIN_SEEDS and np.ptp(ours - theirs) > rounding:
        from scipy.stats import ttest_1samp

        test = ttest_1samp(ours - theirs, 0.0)
        ends, p_value = test.confidence_interval(CONFIDENCE), float(test.pvalue)
        return Difference(mean, float(ends.low), float(ends.high), p_value, p_value, "seeds", len(seeds))
    mean = mean if abs(mean) > rounding else 0.0
    margins = [_margins(numbers[seed], reference[seed], changes.get(seed)) for seed in seeds]
    below, above = (math.hypot(*side) / len(seeds) for side in zip(*margins, strict=True))
    if math.isnan(below + above):
        return Difference(mean, None, None, None, None, "examples", len(seeds))
    towards_zero = below if mean > 0.0 else above
    z = _Z * abs(mean) / towards_zero if mean and towards_zero else math.inf if mean else 0.0
    p_value = math.erfc(z / math.sqrt(2))
    return Difference(mean, mean - below, mean + above, p_value, p_value, "examples", len(seeds))


def differences_to(
    reference: str, numbers: Mapping[str, BySeed], changes: Mapping[str, BySeed]
) -> dict[str, Difference]:
    """The difference of every other entry of `numbers` to the reference, with Holm's correction for all of them.

    Entries without a seed in common with the reference are left out. changes: see `difference_over_seeds`.
    """
    found = {}
    for name in numbers:
        each = difference_over_seeds(numbers[name], numbers.get(reference, {}), changes.get(name, {}))
        if name != reference and each is not None:
            found[name] = each
    tested = {name: each.p_value for name, each in found.items() if each.p_value is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    return {name: replace(each, adjusted_p_value=adjusted.get(name)) for name, each in found.items()}


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of a family of tests (Holm 1979, step-down), in the order given."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    factors = np.arange(len(p_values), 0, -1)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, factors * np.asarray(p_values)[order]))
    return [float(each) for each in adjusted]


class Spread(NamedTuple):
    """deviation: over seeds, None below `MIN_SEEDS`. standard_error: of a run, by the root mean square; may be None."""

    mean: float
    deviation: float | None
    standard_error: float | None
    num_seeds: int


def spread(by_seed: BySeed) -> Spread | None:
    """Mean and spread over the seeds that have a finite value; None if none has."""
    found = [each for each in by_seed.values() if _has_value(each)]
    if not found:
        return None
    values = np.array([each.value for each in found])
    errors = [math.nan if each.standard_error is None else each.standard_error for each in found]
    error = math.hypot(*errors) / math.sqrt(len(found))
    deviation = float(values.std(ddof=1)) if len(found) >= MIN_SEEDS else None
    return Spread(float(values.mean()), deviation, None if math.isnan(error) else error, len(found))


def _margins(number: Estimate, reference: Estimate, change: Estimate | None) -> tuple[float, float]:
    """How far the 95 % interval of `number` - `reference` extends below and above their difference; NaN if unknown.

    Independent numbers: from the intervals of both (MOVER: Zou and Donner, Statistics in Medicine 27, 2008; of two
    fractions it is Newcombe's interval).
    """
    if change is not None and change.standard_error:
        return _Z * change.standard_error, _Z * change.standard_error
    sides = []
    for each in (number.interval(), reference.interval()):
        if each is None or each.low is None or each.high is None:
            return math.nan, math.nan
        sides.append((each.value - each.low, each.high - each.value))
    (below, above), (reference_below, reference_above) = sides
    return math.hypot(below, reference_above), math.hypot(above, reference_below)


def _has_value(estimate: Estimate | None) -> bool:
    return estimate is not None and estimate.value is not None and math.isfinite(estimate.value)
