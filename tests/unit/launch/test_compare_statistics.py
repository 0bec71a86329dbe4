"""Statistics of a comparison, on numbers whose answers are known."""

from __future__ import annotations

import math

import pytest

from launch.compare.statistics import compare_metric, holm, paired_difference, spread
from launch.evaluation import Estimate

# Student's own example (1908): hours of sleep gained by ten patients under two drugs, patient by patient.
DRUG_A = (0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0)
DRUG_B = (1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4)


def runs(*values: float | None, error: float | None = 0.05) -> dict[int, Estimate]:
    """One estimate per seed."""
    return {seed: Estimate(value, error, 100) for seed, value in enumerate(values)}


def test_students_own_data() -> None:
    found = paired_difference(runs(*DRUG_B), runs(*DRUG_A), {})
    assert found is not None
    assert (found.basis, found.num_seeds) == ("seeds", 10)
    assert found.mean == pytest.approx(1.58)
    assert found.p_value == pytest.approx(0.00283289, rel=1e-5)
    assert found.half_width == pytest.approx((2.4598858 - 0.7001142) / 2, rel=1e-6)


def test_pairing_takes_out_what_the_seeds_share() -> None:
    """Seeds differ far more than arms; unpaired, the difference would drown in that."""
    found = paired_difference(runs(0.11, 0.52, 0.93), runs(0.10, 0.50, 0.90), {})
    assert found is not None
    assert found.half_width is not None
    assert found.half_width < 0.03


def test_the_spread_over_seeds_and_that_of_one_run_are_told_apart() -> None:
    estimates = {
        0: Estimate(1.0, 0.3, 9),
        1: Estimate(2.0, 0.4, 9),
        2: Estimate(None, None, 0),
        3: Estimate(6.0, 0.0, 9),
    }
    found = spread(estimates)
    assert found is not None
    assert (found.mean, found.num_seeds) == (3.0, 3)
    assert found.deviation == pytest.approx(math.sqrt(7.0))
    assert found.standard_error == pytest.approx(math.sqrt(0.25 / 3))


@pytest.mark.parametrize("count", [1, 2])
def test_few_seeds_say_nothing_about_their_spread(count: int) -> None:
    ours, theirs = runs(*(0.6, 0.9)[:count]), runs(*(0.4, 0.5)[:count])
    found = spread(ours)
    assert found is not None
    assert found.deviation is None
    difference = paired_difference(ours, theirs, {})
    assert difference is not None
    assert difference.basis == "examples"
    # Of a mean of `count` differences of two errors of 0.05, however much the differences themselves differ.
    error = 0.05 * math.sqrt(2 / count)
    assert difference.half_width == pytest.approx(1.959964 * error, rel=1e-6)
    z = difference.mean / error
    assert difference.p_value == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-9)


def test_seeds_that_differ_alike_are_no_proof() -> None:
    """Student's t would be infinite, and with rounding p would be 1e-30; the examples say how sure it is."""
    found = paired_difference(runs(0.3, 0.5, 0.7, error=0.1), runs(0.2, 0.4, 0.6, error=0.1), {})
    assert found is not None
    assert found.basis == "examples"
    assert found.p_value == pytest.approx(math.erfc(0.1 / math.sqrt(0.06 / 9) / math.sqrt(2)))


@pytest.mark.parametrize(("ours", "p_value"), [(0.0, 1.0), (1.0, 0.0)])
def test_numbers_without_any_error_are_equal_or_not(ours: float, p_value: float) -> None:
    found = paired_difference(runs(ours, ours, ours, error=0.0), runs(0.0, 0.0, 0.0, error=0.0), {})
    assert found is not None
    assert (found.mean, found.half_width, found.p_value) == (ours, 0.0, p_value)


def test_equal_up_to_rounding_is_equal() -> None:
    found = paired_difference(runs(0.1 + 0.2, error=0.0), runs(0.3, error=0.0), {})
    assert found is not None
    assert (found.mean, found.p_value) == (0.0, 1.0)


def test_without_an_error_nothing_is_said() -> None:
    metric = compare_metric("m", {"a": runs(0.5), "b": runs(0.9, error=None)}, "a", {})
    assert metric.spreads["b"].standard_error is None
    difference = metric.differences["b"]
    assert difference.mean == pytest.approx(0.4)
    assert (difference.half_width, difference.p_value, difference.within_noise) == (None, None, None)


def test_differences_example_by_example_have_the_smaller_error() -> None:
    """Seed 0 has been compared question by question, seed 1 has not."""
    found = paired_difference(runs(0.6, 0.6), runs(0.5, 0.5), {0: Estimate(0.1, 0.01, 100)})
    assert found is not None
    error = math.sqrt(0.01**2 + 2 * 0.05**2) / 2
    assert found.half_width == pytest.approx(1.959964 * error, rel=1e-6)
    # Where there are seeds enough, they have the word: what they vary by holds the examples too.
    seeds = paired_difference(runs(0.6, 0.7, 0.5), runs(0.5, 0.5, 0.5), {0: Estimate(0.1, 0.01, 100)})
    assert seeds is not None
    assert seeds.basis == "seeds"


def test_arms_and_seeds_without_the_metric_are_left_out() -> None:
    arms = {
        "a": runs(0.5, 0.6, 0.7, 0.8),
        "none": runs(None, None, math.inf, math.nan),
        "some": runs(0.7, None, 0.7, math.inf),
        "absent": {},
    }
    metric = compare_metric("m", arms, "a", {})
    assert set(metric.spreads) == {"a", "some"}
    assert set(metric.differences) == {"some"}
    assert metric.differences["some"].num_seeds == 2
    assert metric.differences["some"].mean == pytest.approx(0.1)
    # Arms that the reference cannot be held against still have their own numbers.
    alone = compare_metric("m", arms, "absent", {})
    assert set(alone.spreads) == {"a", "some"}
    assert alone.differences == {}


def test_holm_against_known_values() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []


def test_one_in_many_arms_has_to_stand_out_further() -> None:
    """p = 0.0455 passes alone; among three arms it does not, while a difference of 5 errors does."""
    reference, doubtful = runs(0.5), runs(0.5 + 2 * 0.05 * math.sqrt(2))
    alone = compare_metric("m", {"ref": reference, "b": doubtful}, "ref", {}).differences["b"]
    assert alone.within_noise is False
    arms = {"ref": reference, "b": doubtful, "c": runs(0.5), "d": runs(0.5 + 5 * 0.05 * math.sqrt(2))}
    among = compare_metric("m", arms, "ref", {}).differences
    assert {arm: found.within_noise for arm, found in among.items()} == {"b": True, "c": True, "d": False}
    assert among["b"].p_value == pytest.approx(alone.p_value)
