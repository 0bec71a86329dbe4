"""Samplers: distributions by chi-squared tests against exact probabilities, by enumeration of all possible draws."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, permutations

import numpy as np
import pytest
import torch

from buffer.sampling.samplers import (
    FifoSampler,
    PrioritisedSampler,
    RecencySampler,
    StratifiedSampler,
    UniformSampler,
    make_sampler,
)
from buffer.settings import BufferSettings

TRIALS = 4_000
SMALLEST_P_VALUE = 1e-4
"""With fixed seeds a failure is a defect, not bad luck."""


def p_value(counts, probabilities):
    """Of Pearson's chi-squared test of `counts` against `probabilities`; both are keyed by outcome."""
    assert counts.keys() <= probabilities.keys(), "an outcome that is not possible"
    expected = np.array(list(probabilities.values())) * counts.total()
    assert expected.sum() == pytest.approx(counts.total())
    assert expected.min() > 5, "the test wants more trials"
    statistic = np.sum((np.array([counts[outcome] for outcome in probabilities]) - expected) ** 2 / expected)
    degrees = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, torch.tensor(statistic / 2, dtype=torch.float64)))


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


def draws(sampler, count, seed=0):
    """How often each ordered draw came out."""
    generator = np.random.default_rng(seed)
    return Counter(tuple(sampler.sample(count, generator).tolist()) for _ in range(TRIALS))


def insert(sampler, rows, tasks=None, priorities=None):
    rows = np.array(rows)
    sampler.insert(
        rows,
        np.array(tasks if tasks is not None else np.zeros(len(rows)), dtype=np.int32),
        np.array(priorities if priorities is not None else np.ones(len(rows)), dtype=np.float32),
    )


def remove(sampler, rows, tasks=None):
    sampler.remove(np.array(rows), np.array(tasks if tasks is not None else np.zeros(len(rows)), dtype=np.int32))


def with_a_history(sampler):
    """Rows 2, 5, 6 and 9 are live, after others came and went."""
    insert(sampler, [0, 2, 4])
    insert(sampler, [5, 6])
    sampler.sample(5, np.random.default_rng(8))
    remove(sampler, [4, 0])
    sampler.sample(3, np.random.default_rng(9))
    insert(sampler, [8, 9])
    remove(sampler, [8])
    return sampler


def test_uniform_draws_each_row_equally_often():
    observed = draws(with_a_history(UniformSampler()), 2)
    assert p_value(observed, successive_sampling(dict.fromkeys([2, 5, 6, 9], 1.0), 2)) > SMALLEST_P_VALUE


@pytest.mark.parametrize("exponent", [0.0, 0.5, 2.0])
def test_recency_follows_the_power_law_of_the_ranks(exponent):
    observed = draws(with_a_history(RecencySampler(exponent)), 2)
    weights = {row: rank**-exponent for rank, row in enumerate([9, 6, 5, 2], start=1)}
    assert p_value(observed, successive_sampling(weights, 2)) > SMALLEST_P_VALUE
    others = {row: rank ** -(exponent + 0.3) for rank, row in enumerate([9, 6, 5, 2], start=1)}
    assert p_value(observed, successive_sampling(others, 2)) < SMALLEST_P_VALUE, "the test tells exponents apart"


@pytest.mark.parametrize("exponent", [0.0, 0.6, 1.0])
def test_prioritised_draws_in_proportion_to_powers_of_priorities(exponent):
    sampler = with_a_history(PrioritisedSampler(exponent))
    priorities = {2: 4.0, 5: 1.0, 6: 0.5, 9: 2.0}
    sampler.update(np.array([9, 2]), np.array([2.0, 4.0], dtype=np.float32))
    sampler.update(np.array([6]), np.array([0.5], dtype=np.float32))
    observed = draws(sampler, 2)
    weights = {row: priority**exponent for row, priority in priorities.items()}
    assert p_value(observed, successive_sampling(weights, 2)) > SMALLEST_P_VALUE


def test_a_priority_of_zero_can_be_drawn_and_is_drawn_last():
    sampler = PrioritisedSampler(1.0)
    insert(sampler, [0, 1, 2], priorities=[3.0, 0.0, 3.0])
    drawn = draws(sampler, 3)
    assert drawn.keys() == {(0, 2, 1), (2, 0, 1)}


def test_stratified_gives_every_task_its_share_and_chance_what_is_left():
    """Tasks of 1, 3 and 2 rows: of 4 each gives one, and one more comes from either of the two that have more."""
    sampler = StratifiedSampler()
    insert(sampler, [0, 1, 2, 3, 4, 5, 6], tasks=[7, 3, 3, 1, 3, 1, 1])
    remove(sampler, [6], tasks=[1])
    observed = Counter()
    for drawn, count in draws(sampler, 4).items():
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
    sampler = StratifiedSampler()
    insert(sampler, range(8), tasks=[0, 0, 0, 0, 0, 1, 2, 2])
    task_of = [0, 0, 0, 0, 0, 1, 2, 2]
    observed = Counter()
    for drawn, count in draws(sampler, 1).items():
        observed[task_of[drawn[0]]] += count
    assert p_value(observed, dict.fromkeys(range(3), 1 / 3)) > SMALLEST_P_VALUE


def test_fifo_gives_the_oldest_in_order():
    assert draws(with_a_history(FifoSampler()), 3) == {(2, 5, 6): TRIALS}


def test_a_large_population_is_drawn_by_the_same_law():
    """Newest thousand, hundred thousand, rest of 300,000 rows, in draws of 500 (few enough to hardly deplete any)."""
    sampler = RecencySampler(0.5)
    num_rows = 300_000
    insert(sampler, range(num_rows))
    bounds = [0, 1_000, 10_000, 100_000, num_rows]
    generator = np.random.default_rng(1)
    ranks = np.concatenate([num_rows - 1 - sampler.sample(500, generator) for _ in range(40)])
    observed = Counter(np.searchsorted(bounds, ranks, side="right").tolist())
    cumulative = np.concatenate([[0.0], np.cumsum(np.arange(1, num_rows + 1) ** -0.5)])
    shares = np.diff(cumulative[bounds]) / cumulative[-1]
    assert p_value(observed, dict(enumerate(shares.tolist(), start=1))) > SMALLEST_P_VALUE


@pytest.mark.parametrize("name", ["uniform", "fifo", "recency", "prioritised", "stratified"])
def test_same_seed_same_rows_and_all_can_be_drawn(name):
    sampler = make_sampler(BufferSettings(sampler=name, max_times_sampled=5))
    rows = np.arange(1000) * 3
    insert(sampler, rows, tasks=np.arange(1000) % 7, priorities=1.0 + np.arange(1000) % 11)
    first, second, other = (sampler.sample(50, np.random.default_rng(seed)).tolist() for seed in (1, 1, 2))
    assert first == second
    assert (first != other) == (name != "fifo")
    assert sorted(sampler.sample(1000, np.random.default_rng(0)).tolist()) == rows.tolist()


def test_settings_without_effect_are_errors():
    with pytest.raises(ValueError, match="recency_exponent has no effect with sampler=uniform"):
        BufferSettings(recency_exponent=2.0)
    with pytest.raises(ValueError, match="priority_exponent has no effect with sampler=recency"):
        BufferSettings(sampler="recency", priority_exponent=0.5)
    with pytest.raises(ValueError, match="max_times_sampled=1 for a queue"):
        BufferSettings(sampler="fifo")
    with pytest.raises(ValueError, match="min_size=65 is never reached with capacity=64"):
        BufferSettings(capacity=64, min_size=65)
