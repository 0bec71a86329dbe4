"""Dividing a draw over shards: exact sums, nobody beyond its limit, as near to proportion as whole rows allow."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffer.service.shard import Offer, plan_parts, split


@st.composite
def weights_and_limits(draw):
    weights = draw(st.lists(st.integers(0, 50), min_size=1, max_size=6))
    limits = [draw(st.integers(0, weight)) for weight in weights]
    return weights, limits


@given(st.integers(0, 200), weights_and_limits())
def test_parts_add_up_within_their_limits(count, shards):
    weights, limits = shards
    parts = split(count, weights, limits)
    if sum(limits) < count:
        assert parts is None
        return
    assert sum(parts) == count
    assert all(0 <= part <= limit for part, limit in zip(parts, limits, strict=True))


@given(st.integers(0, 200), weights_and_limits())
def test_parts_are_in_proportion_among_those_that_are_not_limited(count, shards):
    weights, limits = shards
    parts = split(count, weights, limits)
    if parts is None:
        return
    free = [index for index, part in enumerate(parts) if part < limits[index]]
    total = sum(weights[index] for index in free)
    taken = sum(parts[index] for index in free)
    for index in free:
        assert abs(parts[index] - Fraction(taken * weights[index], total)) < 2
    # Nobody gets more per row than somebody whose limit left him with less: limits bind from above only.
    for index in free:
        for other, part in enumerate(parts):
            assert part * weights[index] <= (parts[index] + 1) * weights[other] + weights[index]


@pytest.mark.parametrize(
    ("count", "weights", "limits", "parts"),
    [
        (8, [30, 10], [30, 10], [6, 2]),
        (8, [10, 10, 10], [10, 10, 10], [2, 3, 3]),
        (7, [1, 100], [1, 100], [0, 7]),
        (10, [50, 50], [2, 50], [2, 8]),  # what a limiter keeps back, the other gives
        (10, [90, 5, 5], [3, 5, 5], [3, 3, 4]),
        (4, [0, 9], [0, 9], [0, 4]),
        (10, [6, 6], [4, 5], None),
    ],
)
def test_known_divisions(count, weights, limits, parts):
    assert split(count, weights, limits) == parts


def test_what_was_logged_stays_and_the_rest_is_divided():
    complete = [Offer(logged=5, live=0, available=0, inserts=0), Offer(logged=3, live=99, available=90, inserts=0)]
    assert plan_parts(8, complete) == [5, 3]
    partial = [Offer(logged=5, live=20, available=15, inserts=0), Offer(logged=0, live=10, available=10, inserts=0)]
    assert plan_parts(8, partial) == [7, 1]
    assert plan_parts(31, partial) is None
