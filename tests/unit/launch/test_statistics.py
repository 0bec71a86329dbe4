"""Estimates, differences and verdicts, on numbers whose answers are known."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from launch.compare.results import Comparison
from launch.evaluation.report import render_evaluation, write_evaluation
from launch.evaluation.results import EVALUATION_FILE, CheckpointResult, Evaluation
from launch.report.evaluation import change_outcome, evaluation_table
from launch.settings.evaluation import GREEDY
from launch.statistics import (
    BySeed,
    Difference,
    Estimate,
    Spread,
    change_by_example,
    difference,
    difference_over_seeds,
    differences_to,
    holm,
    spread,
)

# Student's own example (1908): hours of sleep gained by ten patients under two drugs, patient by patient.
DRUG_A = (0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0)
DRUG_B = (1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4)


def runs(*values: float | None, error: float | None = 0.05) -> dict[int, Estimate]:
    """One estimate per seed."""
    return {seed: Estimate(value, error, 30) for seed, value in enumerate(values)}


def compared(ours: BySeed, theirs: BySeed, changes: BySeed) -> Difference:
    found = difference_over_seeds(ours, theirs, changes)
    assert found is not None
    return found


def test_students_own_data() -> None:
    found = compared(runs(*DRUG_B), runs(*DRUG_A), {})
    assert (found.basis, found.num_seeds) == ("seeds", 10)
    assert found.value == pytest.approx(1.58)
    assert found.p_value == pytest.approx(0.00283289, rel=1e-5)
    assert found.half_width == pytest.approx((2.4598858 - 0.7001142) / 2, rel=1e-6)


@pytest.mark.parametrize("count", [1, 2])
def test_few_seeds_say_nothing_about_their_spread(count: int) -> None:
    ours, theirs = runs(*(0.6, 0.9)[:count]), runs(*(0.4, 0.5)[:count])
    assert spread(ours) == Spread(pytest.approx(0.6 if count == 1 else 0.75), None, pytest.approx(0.05), count)
    found = compared(ours, theirs, {})
    assert found.basis == "examples"
    # Of a mean of `count` differences of two errors of 0.05, however much the differences themselves differ.
    error = 0.05 * math.sqrt(2 / count)
    assert found.half_width == pytest.approx(1.959964 * error, rel=1e-6)
    assert found.p_value == pytest.approx(math.erfc(found.value / error / math.sqrt(2)), rel=1e-9)


def test_seeds_that_differ_alike_are_no_proof() -> None:
    """Student's t would be infinite, and with rounding p would be 1e-30; the examples say how sure it is."""
    found = compared(runs(0.3, 0.5, 0.7, error=0.1), runs(0.2, 0.4, 0.6, error=0.1), {})
    assert found.basis == "examples"
    assert found.p_value == pytest.approx(math.erfc(0.1 / math.sqrt(0.06 / 9) / math.sqrt(2)))


@pytest.mark.parametrize(("ours", "p_value"), [(2.0, 1.0), (3.0, 0.0)])
def test_numbers_without_any_error_are_equal_or_not(ours: float, p_value: float) -> None:
    assert compared(runs(0.1 + 0.2, error=0.0), runs(0.3, error=0.0), {}).p_value == 1.0, "equal up to rounding"
    found = compared(runs(ours, ours, ours, error=0.0), runs(2.0, 2.0, 2.0, error=0.0), {})
    assert (found.value, found.half_width, found.p_value) == (ours - 2.0, 0.0, p_value)


def test_without_an_error_nothing_is_said() -> None:
    unsure = runs(0.9, error=None)
    assert spread(unsure) == Spread(0.9, None, None, 1)
    found = differences_to("a", {"a": runs(0.5), "b": unsure}, {})["b"]
    assert found.value == pytest.approx(0.4)
    assert (found.half_width, found.p_value, found.within_noise) == (None, None, None)


def test_differences_example_by_example_have_the_smaller_error() -> None:
    """Seed 0 has been compared question by question, seed 1 has not."""
    found = compared(runs(0.6, 0.6), runs(0.5, 0.5), {0: Estimate(0.1, 0.01, 100)})
    error = math.sqrt(0.01**2 + 2 * 0.05**2) / 2
    assert found.half_width == pytest.approx(1.959964 * error, rel=1e-6)
    # Where there are seeds enough, they have the word: what they vary by holds the examples too.
    seeds = compared(runs(0.6, 0.7, 0.5), runs(0.5, 0.5, 0.5), {0: Estimate(0.1, 0.01, 100)})
    assert seeds.basis == "seeds"


def test_objectives_and_seeds_without_the_metric_are_left_out() -> None:
    objectives = {
        "a": runs(0.5, 0.6, 0.7, 0.8),
        "none": runs(None, None, math.inf, math.nan),
        "some": runs(0.7, None, 0.7, math.inf),
        "absent": {},
    }
    assert {name for name, by_seed in objectives.items() if spread(by_seed) is not None} == {"a", "some"}
    several = {0: Estimate(1.0, 0.3, 9), 1: Estimate(2.0, 0.4, 9), 2: Estimate(None, None, 0), 3: Estimate(6.0, 0.0, 9)}
    assert spread(several) == Spread(3.0, pytest.approx(math.sqrt(7.0)), pytest.approx(math.sqrt(0.25 / 3)), 3)
    found = differences_to("a", objectives, {})
    assert set(found) == {"some"}
    assert found["some"].num_seeds == 2
    assert found["some"].value == pytest.approx(0.1)
    assert differences_to("absent", objectives, {}) == {}


def test_holm_against_known_values() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []


def test_one_in_many_objectives_has_to_stand_out_further() -> None:
    """p = 0.0455 passes alone; among three objectives it does not, while a difference of 5 errors does."""
    reference, doubtful = runs(0.5), runs(0.5 + 2 * 0.05 * math.sqrt(2))
    alone = differences_to("ref", {"ref": reference, "b": doubtful}, {})["b"]
    assert alone.within_noise is False
    objectives = {"ref": reference, "b": doubtful, "c": runs(0.5), "d": runs(0.5 + 5 * 0.05 * math.sqrt(2))}
    among = differences_to("ref", objectives, {})
    assert {name: found.within_noise for name, found in among.items()} == {"b": True, "c": True, "d": False}
    assert among["b"].p_value == pytest.approx(alone.p_value)


def test_ratio_of_nothing_and_of_one() -> None:
    assert Estimate.ratio(np.array([1.0]), np.array([0.0])).value is None
    one = Estimate.ratio(np.array([3.0]), np.array([2.0]))
    assert (one.value, one.standard_error, one.count) == (1.5, None, 1)


def test_error_of_a_ratio_equals_the_spread_of_resampled_ratios() -> None:
    rng = np.random.default_rng(1)
    denominators = rng.integers(1, 20, 400).astype(np.float64)
    numerators = denominators * rng.uniform(1.0, 2.0, 400)
    found = Estimate.ratio(numerators, denominators)
    draws = rng.integers(0, 400, (2000, 400))
    spread = (numerators[draws].sum(1) / denominators[draws].sum(1)).std()
    assert found.standard_error == pytest.approx(spread, rel=0.1)


def verdict(number: Estimate, baseline: Estimate) -> bool | None:
    found = difference(number, baseline, change_by_example(number, baseline))
    assert found is not None
    return found.within_noise


def test_paired_differences_know_what_examples_share() -> None:
    rng = np.random.default_rng(4)
    hard = rng.random(500) < 0.5
    first = hard & (rng.random(500) < 0.98)
    second = hard & (rng.random(500) < 0.90)
    number, baseline = Estimate.fraction(first), Estimate.fraction(second)
    change = change_by_example(number, baseline)
    assert change is not None
    assert change.value == pytest.approx(first.mean() - second.mean())
    assert change.standard_error == pytest.approx(np.std(first * 1.0 - second * 1.0, ddof=1) / np.sqrt(500))
    assert change.standard_error < math.hypot(number.standard_error or 0, baseline.standard_error or 0) / 2
    assert verdict(number, baseline) is False
    same = change_by_example(number, number)
    assert same is not None
    assert verdict(number, number) is True
    assert change_by_example(number, Estimate(0.5, 0.1, 500)) is None  # not of these examples
    assert change_by_example(number, Estimate.fraction(first[:10])) is None


def test_differences_of_token_fractions_are_clustered_by_example() -> None:
    rng = np.random.default_rng(6)
    example = np.repeat(np.arange(300), 8)
    of_example = rng.random(300)
    cases = rng.random(2400) < of_example[example]
    zero = Estimate.fraction(np.zeros(2400, dtype=bool), example, 300)
    change = change_by_example(Estimate.fraction(cases, example, 300), zero)
    assert change is not None
    draws = rng.integers(0, 300, (2000, 300))
    spread = cases.reshape(300, 8).mean(1)[draws].mean(1).std()
    assert change.standard_error == pytest.approx(spread, rel=0.1)


def test_intervals_of_fractions_are_wilsons_and_newcombes() -> None:
    # Newcombe, Statistics in Medicine 17 (1998) 873-890, table II: 56/70 against 48/80.
    first, second = Estimate.fraction(np.arange(70) < 56), Estimate.fraction(np.arange(80) < 48)
    interval = first.interval()
    assert interval is not None
    assert (interval.low, interval.high) == (pytest.approx(0.6918, abs=1e-3), pytest.approx(0.8772, abs=1e-3))
    apart = difference(first, second)
    assert apart is not None
    assert (apart.low, apart.high) == (pytest.approx(0.0524, abs=1e-4), pytest.approx(0.3339, abs=1e-4))
    nothing = Estimate.fraction(np.zeros(500, dtype=bool)).interval()
    assert nothing is not None
    assert (nothing.low, nothing.high) == (0.0, pytest.approx(0.0076, abs=1e-4))
    unsure = difference(first, Estimate(1.0, None, 70))
    assert unsure is not None
    assert unsure.low is None


@pytest.mark.parametrize("gap", np.linspace(-0.3, 0.3, 25).tolist())
@pytest.mark.parametrize("error", [0.05, 0.1])
def test_p_is_below_5_percent_where_the_interval_leaves_out_0(gap: float, error: float) -> None:
    rng = np.random.default_rng(3)
    numbers = {
        "normal": (runs(0.4 + gap, error=error), runs(0.4, error=error)),
        "fractions": ({0: Estimate.fraction(np.arange(60) < 60 * (0.4 + gap))}, {0: Estimate.fraction(np.ones(9) > 2)}),
        "seeds": (runs(*(0.4 + gap + rng.normal(0, error, 4))), runs(0.4, 0.4, 0.4, 0.4)),
    }
    for ours, theirs in numbers.values():
        found = difference_over_seeds(ours, theirs, {})
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        assert found.within_noise == (found.low <= 0.0 <= found.high)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(0, 0), (20, 20), (0, 20), (0, 3), (0, 4), (0, 5), (0, 6), (7, 8), (7, 14), (7, 11), (7, 12), (7, 13)],
)
def test_terminal_page_and_comparison_give_the_same_verdict(ours: int, theirs: int, tmp_path: Path) -> None:
    """From the same answers of 20 questions, with the differences question by question and without them."""
    answers = {label: Estimate.fraction(np.arange(20) < right) for label, right in (("a", ours), ("b", theirs))}
    apart = answers | {"b": Estimate(answers["b"].value, answers["b"].standard_error, 20)}
    for index, numbers in enumerate((answers, apart)):
        metrics = {label: {GREEDY: {"accuracy": each}} for label, each in numbers.items()}
        results = [CheckpointResult(label, tmp_path, found) for label, found in metrics.items()]
        evaluation = Evaluation.of("arithmetic", 20, 0, results, {}, {})
        run = tmp_path / str(index)
        run.mkdir()
        write_evaluation(evaluation, run)
        table = evaluation_table(run, {"a"})
        assert table is not None
        cell = table.measures[0].cells[1]
        assert cell.change is not None
        runs = {(each.label, 0): each for each in table.evaluation.checkpoints}
        compared = Comparison("arithmetic", 1, ("a", "b"), (0,), runs, {}, {}).metrics()[0]
        within_noise = compared.differences["b"].within_noise
        assert within_noise is not None
        assert cell.change.within_noise == within_noise
        outcome = change_outcome(cell.change, table.measures[0].info)
        assert outcome == (None if within_noise else "better" if theirs > ours else "worse")
        if index == 0:
            written = json.loads((run / EVALUATION_FILE).read_text())["checkpoints"][1]["differences"]
            assert written[GREEDY]["accuracy"]["within_noise"] == within_noise
            terminal = Console(width=100, file=io.StringIO(), record=True)
            terminal.print(render_evaluation(evaluation))
            rows = terminal.export_text().partition("minus a")[2].splitlines()
            assert ["~" in row for row in rows if row.startswith("b ")] == [within_noise]
