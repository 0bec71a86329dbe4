"""What the numbers of several runs say: spread over seeds, paired differences, and which of them are within noise.

Arms are compared seed by seed: runs of one seed share their start and their held-out examples. With n >= 3 seeds a
difference has Student's interval with n - 1 degrees of freedom over the n paired differences. With fewer seeds, or
where all differences are the same, that interval says nothing, and the errors of the evaluations take its place, which
know of the examples only, not of other seeds: those of differences example by example, where the evaluation has them,
else those of both arms as if they were independent, which is cautious where both were asked the same questions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from launch.evaluation import Estimate

MIN_SEEDS = 3
"""Fewer say nothing about the spread over seeds."""

CONFIDENCE = 0.95

_SAME = 1e-12  # relative: what differs by no more differs by rounding

Basis = Literal["seeds", "examples"]
"""What the uncertainty of a difference was taken from."""

BySeed = Mapping[int, Estimate]


@dataclass(frozen=True)
class Spread:
    """A metric of one arm. deviation: standard deviation over seeds, None below `MIN_SEEDS`. standard_error: of one
    run, the root of the mean square over runs; None where a run has none.
    """

    mean: float
    deviation: float | None
    standard_error: float | None
    num_seeds: int


@dataclass(frozen=True)
class Difference:
    """An arm minus the reference, over the seeds that have both.

    half_width: of the 95 % interval. p_value: two-sided, of this difference alone; adjusted_p_value: with Holm's
    correction for the arms that were compared. The three are None where nothing says how uncertain the numbers are.
    """

    mean: float
    half_width: float | None
    p_value: float | None
    adjusted_p_value: float | None
    basis: Basis
    num_seeds: int

    @property
    def within_noise(self) -> bool | None:
        """Whether chance alone explains it well enough; None where that cannot be said."""
        return None if self.adjusted_p_value is None else self.adjusted_p_value > 1.0 - CONFIDENCE


@dataclass(frozen=True)
class ComparedMetric:
    """One metric over all arms that have it. differences: of all but the reference, by arm."""

    name: str
    spreads: dict[str, Spread]
    differences: dict[str, Difference]


def compare_metric(
    name: str, arms: Mapping[str, BySeed], reference: str, changes: Mapping[str, BySeed]
) -> ComparedMetric:
    """Compare one metric of every arm with that of the reference. Arms and seeds without it are left out.

    changes: by arm, the differences to the reference that were measured example by example, as far as there are any.
    """
    spreads = {arm: spread(by_seed) for arm, by_seed in arms.items()}
    held_against = arms.get(reference, {})
    differences = {
        arm: paired_difference(by_seed, held_against, changes.get(arm, {}))
        for arm, by_seed in arms.items()
        if arm != reference
    }
    tested = {
        arm: found.p_value for arm, found in differences.items() if found is not None and found.p_value is not None
    }
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    return ComparedMetric(
        name,
        {arm: found for arm, found in spreads.items() if found is not None},
        {
            arm: replace(found, adjusted_p_value=adjusted.get(arm))
            for arm, found in differences.items()
            if found is not None
        },
    )


def spread(by_seed: BySeed) -> Spread | None:
    """Mean and spread of a metric over the seeds that have it; None if none has."""
    values = [value for estimate in by_seed.values() if (value := _value(estimate)) is not None]
    if not values:
        return None
    errors = [estimate.standard_error for estimate in by_seed.values() if _value(estimate) is not None]
    known = [error for error in errors if error is not None]
    return Spread(
        mean=float(np.mean(values)),
        deviation=float(np.std(values, ddof=1)) if len(values) >= MIN_SEEDS else None,
        standard_error=math.sqrt(sum(error**2 for error in known) / len(known)) if len(known) == len(errors) else None,
        num_seeds=len(values),
    )


def paired_difference(arm: BySeed, reference: BySeed, changes: BySeed) -> Difference | None:
    """Arm minus reference, its p-value not adjusted; None if no seed has both. changes: see `compare_metric`."""
    seeds = [seed for seed in arm if _value(arm[seed]) is not None and _value(reference.get(seed)) is not None]
    if not seeds:
        return None
    ours, theirs = (np.array([side[seed].value for seed in seeds]) for side in (arm, reference))
    rounding = _SAME * float(np.maximum(np.abs(ours), np.abs(theirs)).max())
    differences = ours - theirs
    if len(seeds) >= MIN_SEEDS and np.ptp(differences) > rounding:
        return _over_seeds(differences)
    mean = float(differences.mean()) if np.abs(differences.mean()) > rounding else 0.0
    errors = [_error_of_difference(arm[seed], reference[seed], changes.get(seed)) for seed in seeds]
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        return Difference(mean, None, None, None, "examples", len(seeds))
    return _over_examples(mean, math.hypot(*known) / len(seeds), len(seeds))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of a family of tests (Holm 1979, step-down), in the order given."""
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order.tolist()):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _over_seeds(differences: npt.NDArray[np.float64]) -> Difference:
    """Student's t-test of paired differences [n]."""
    from scipy.stats import t

    count = len(differences)
    mean = float(differences.mean())
    error = float(differences.std(ddof=1)) / math.sqrt(count)
    half_width = error * float(t.ppf((1.0 + CONFIDENCE) / 2.0, count - 1))
    p_value = 2.0 * float(t.sf(abs(mean) / error, count - 1))
    return Difference(mean, half_width, p_value, None, "seeds", count)


def _over_examples(mean: float, error: float, count: int) -> Difference:
    """Normal test with a known standard error. Without any error a difference is certain, one way or the other."""
    from scipy.stats import norm

    half_width = error * float(norm.ppf((1.0 + CONFIDENCE) / 2.0))
    certain = 1.0 if mean == 0.0 else 0.0
    p_value = certain if error == 0.0 else 2.0 * float(norm.sf(abs(mean) / error))
    return Difference(mean, half_width, p_value, None, "examples", count)


def _error_of_difference(ours: Estimate, theirs: Estimate, change: Estimate | None) -> float | None:
    """Over the examples of one seed."""
    if change is not None and change.standard_error is not None:
        return change.standard_error
    if ours.standard_error is None or theirs.standard_error is None:
        return None
    return math.hypot(ours.standard_error, theirs.standard_error)


def _value(estimate: Estimate | None) -> float | None:
    """What can be averaged."""
    if estimate is None or estimate.value is None or not math.isfinite(estimate.value):
        return None
    return estimate.value
