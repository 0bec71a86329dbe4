"""Samplers: distributions by chi-squared tests against exact probabilities, by enumeration of all possible draws."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import combinations, permutations

import numpy as np
import pytest
from scipy.stats import chisquare

from buffer.settings import BufferSettings
from buffer.store.sampling import by_priority, by_recency, by_task, choose, uniform

TRIALS = 4_000
SMALLEST_P_VALUE = 1e-4
"""With fixed seeds a failure is a defect, not bad luck."""


def p_value(counts, probabilities):
    """Of Pearson's chi-squared test of `counts` against `probabilities`; both are keyed by outcome."""
    assert counts.keys() <= probabilities.keys(), "an outcome that is not possible"
    expected = np.array(list(probabilities.values())) * counts.total()
    assert expected.sum() == pytest.approx(counts.total())
    assert expected.min() > 5, "the test wants more trials"
    return float(chisquare([counts[outcome] for outcome in probabilities], expected).pvalue)


def successive_sampling(weights, count):
    """Probability of each ordered draw of `count` rows; weights: keyed by row."""
    probabilities = {}
    for drawn in permutations(weights, count):
        probability, left = 1.0, sum(weights.values())
        for row in drawn:
            probability *= weights[row] / left
            left -= weights[row]
        probabilities[drawn] = probability
    return probabilities


def draws(sample, rows, count, seed=0):
    """How often each ordered draw of these rows came out."""
    generator = np.random.default_rng(seed)
    return Counter(tuple(np.array(rows)[sample(count, generator)].tolist()) for _ in range(TRIALS))


ROWS = [2, 5, 6, 9]


def test_uniform_draws_each_row_equally_often():
    observed = draws(partial(uniform, 4), ROWS, 2)
    assert p_value(observed, successive_sampling(dict.fromkeys(ROWS, 1.0), 2)) > SMALLEST_P_VALUE


@pytest.mark.parametrize("exponent", [0.0, 0.5, 2.0])
def test_recency_follows_the_power_law_of_the_ranks(exponent):
    observed = draws(lambda count, generator: by_recency(4, count, exponent, generator), ROWS, 2)
    weights = {row: rank**-exponent for rank, row in enumerate([9, 6, 5, 2], start=1)}
    assert p_value(observed, successive_sampling(weights, 2)) > SMALLEST_P_VALUE
    others = {row: rank ** -(exponent + 0.3) for rank, row in enumerate([9, 6, 5, 2], start=1)}
    assert p_value(observed, successive_sampling(others, 2)) < SMALLEST_P_VALUE, "the test tells exponents apart"


@pytest.mark.parametrize("exponent", [0.0, 0.6, 1.0])
def test_prioritized_draws_in_proportion_to_powers_of_priorities(exponent):
    priorities = np.array([4.0, 1.0, 0.5, 2.0], dtype=np.float32)
    observed = draws(lambda count, generator: by_priority(priorities, count, exponent, generator), ROWS, 2)
    weights = {row: priority**exponent for row, priority in zip(ROWS, priorities.tolist(), strict=True)}
    assert p_value(observed, successive_sampling(weights, 2)) > SMALLEST_P_VALUE


def test_a_priority_of_zero_can_be_drawn_and_is_drawn_last():
    priorities = np.array([3.0, 0.0, 3.0], dtype=np.float32)
    drawn = draws(lambda count, generator: by_priority(priorities, count, 1.0, generator), [0, 1, 2], 3)
    assert drawn.total() - drawn[0, 2, 1] - drawn[2, 0, 1] <= 1, "it counts as a millionth"


def test_stratified_gives_every_task_its_share_and_chance_what_is_left():
    """Tasks of 1, 3 and 2 rows: of 4 each gives one, and one more comes from either of the two that have more."""
    tasks = np.array([7, 3, 3, 1, 3, 1], dtype=np.int32)
    observed = Counter()
    for drawn, count in draws(partial(by_task, tasks), range(6), 4).items():
        observed[tuple(sorted(drawn))] += count
    probabilities = {}
    for share_of_three in (1, 2):
        share_of_two = 3 - share_of_three
        threes, twos = list(combinations([1, 2, 4], share_of_three)), list(combinations([3, 5], share_of_two))
        for three in threes:
            for two in twos:
                probabilities[tuple(sorted((0, *three, *two)))] = 0.5 / len(threes) / len(twos)
    assert p_value(observed, probabilities) > SMALLEST_P_VALUE


def test_stratified_draws_fewer_rows_than_tasks_from_tasks_chosen_alike():
    tasks = np.array([0, 0, 0, 0, 0, 1, 2, 2], dtype=np.int32)
    observed = Counter()
    for drawn, count in draws(partial(by_task, tasks), range(8), 1).items():
        observed[int(tasks[drawn[0]])] += count
    assert p_value(observed, dict.fromkeys(range(3), 1 / 3)) > SMALLEST_P_VALUE


def test_stratified_goes_by_the_rows_alone_not_by_the_codes_of_their_tasks():
    first, second = (
        by_task(np.array(codes, dtype=np.int32), 3, np.random.default_rng(4)).tolist()
        for codes in ([7, 3, 3, 1, 3, 1], [0, 1, 1, 9, 1, 9])
    )
    assert first == second


def test_fifo_gives_the_oldest_in_order():
    settings = BufferSettings(sampler="fifo", max_times_sampled=5)
    assert choose(settings, 4, 3, np.random.default_rng(0), nothing).tolist() == [0, 1, 2]


def nothing(name: str) -> np.ndarray:
    raise AssertionError("not looked at")


@pytest.mark.parametrize("name", ["uniform", "fifo", "recency", "prioritized", "stratified"])
def test_same_seed_same_rows_and_all_can_be_drawn(name):
    settings = BufferSettings(sampler=name, max_times_sampled=5)
    columns = {"priority": (1.0 + np.arange(1000) % 11).astype(np.float32), "task": np.arange(1000, dtype=np.int32) % 7}

    def sample(count, seed):
        return choose(settings, 1000, count, np.random.default_rng(seed), columns.__getitem__).tolist()

    first, second, other = (sample(50, seed) for seed in (1, 1, 2))
    assert first == second
    assert (first != other) == (name != "fifo")
    assert sorted(sample(1000, 0)) == list(range(1000))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recency_exponent": 2.0}, "recency_exponent has no effect with sampler=uniform"),
        ({"sampler": "recency", "priority_exponent": 0.5}, "priority_exponent has no effect with sampler=recency"),
        ({"sampler": "fifo"}, "max_times_sampled=1 for a queue"),
        ({"capacity": 64, "min_size": 65}, "min_size=65 is never reached with capacity=64"),
        ({"fsync_interval_s": 0.5}, "fsync_interval_s has no effect with fsync=batch"),
        (
            {"capacity": 100, "min_size": 10, "samples_per_insert": 1.0, "samples_per_insert_tolerance": 91.0},
            "lower it to 90 at most, or raise capacity",
        ),
        (
            {"samples_per_insert": 3.0, "max_times_sampled": 2},
            "samples_per_insert=3 is never reached with max_times_sampled=2",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        BufferSettings(**changes)
