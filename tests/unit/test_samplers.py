"""Samplers: distributions by chi-squared tests against exact probabilities."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from buffer.samplers import RecencySampler, UniformSampler, make_sampler
from buffer.settings import BufferSettings

TRIALS = 20_000
# Upper 1e-4 quantiles of the chi-squared distribution: with fixed seeds a failure is a defect, not bad luck.
CHI_SQUARED_LIMIT = {9: 33.7, 19: 50.8}


def chi_squared(counts, probabilities):
    expected = np.asarray(probabilities) * np.sum(counts)
    return float(np.sum((np.asarray(counts) - expected) ** 2 / expected))


def inclusion_counts(sampler, num_live, count, seed=0):
    generator = np.random.default_rng(seed)
    draws = np.stack([sampler.sample(num_live, count, generator) for _ in range(TRIALS)])
    assert all(len(set(draw)) == count for draw in draws[:200].tolist())
    return np.bincount(draws.reshape(-1), minlength=num_live)


def test_uniform_draws_each_row_equally_often():
    counts = inclusion_counts(UniformSampler(), 10, 1)
    assert chi_squared(counts, np.full(10, 0.1)) < CHI_SQUARED_LIMIT[9]
    # Without replacement the counts vary less than a multinomial: the limit still holds.
    assert chi_squared(inclusion_counts(UniformSampler(), 10, 4), np.full(10, 0.1)) < CHI_SQUARED_LIMIT[9]


@pytest.mark.parametrize("exponent", [0.0, 0.5, 2.0])
def test_recency_follows_the_power_law(exponent):
    counts = inclusion_counts(RecencySampler(exponent), 10, 1)
    weights = np.arange(10, 0, -1.0) ** -exponent  # position 0 is the oldest, rank 10
    assert chi_squared(counts, weights / weights.sum()) < CHI_SQUARED_LIMIT[9]


def test_recency_without_replacement_is_successive_sampling():
    exponent, num_live, count = 1.0, 5, 2
    weights = np.arange(num_live, 0, -1.0) ** -exponent
    pairs = list(permutations(range(num_live), count))
    probabilities = [
        weights[first] / weights.sum() * weights[second] / (weights.sum() - weights[first]) for first, second in pairs
    ]
    assert sum(probabilities) == pytest.approx(1.0)
    generator = np.random.default_rng(3)
    sampler = RecencySampler(exponent)
    drawn = Counter(tuple(sampler.sample(num_live, count, generator).tolist()) for _ in range(TRIALS))
    assert chi_squared([drawn[pair] for pair in pairs], probabilities) < CHI_SQUARED_LIMIT[19]


@pytest.mark.parametrize("sampler", [UniformSampler(), RecencySampler(1.0)])
def test_all_and_none(sampler):
    generator = np.random.default_rng(0)
    assert sorted(sampler.sample(7, 7, generator).tolist()) == list(range(7))
    assert sampler.sample(7, 0, generator).tolist() == []


@pytest.mark.parametrize("sampler", [UniformSampler(), RecencySampler(1.0)])
def test_same_seed_same_rows(sampler):
    first, second, other = (sampler.sample(1000, 50, np.random.default_rng(seed)).tolist() for seed in (1, 1, 2))
    assert first == second
    assert first != other


def test_settings_choose_the_sampler():
    assert isinstance(make_sampler(BufferSettings()), UniformSampler)
    newest_only = make_sampler(BufferSettings(sampler="recency", recency_exponent=32.0))
    assert newest_only.sample(50, 1, np.random.default_rng(0)).tolist() == [49]


def test_settings_without_effect_are_errors():
    with pytest.raises(ValueError, match="recency_exponent has no effect with sampler=uniform"):
        BufferSettings(recency_exponent=2.0)
    with pytest.raises(ValueError, match="min_size=65 is never reached with capacity=64"):
        BufferSettings(capacity=64, min_size=65)
    with pytest.raises(ValueError, match="negative"):
        RecencySampler(-1.0)
