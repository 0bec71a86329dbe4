"""Staleness: the formula against a plain loop."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.trajectory.staleness import NO_VERSION, VersionRange, stale_rows, staleness
from tests.trajectories import batch_of, expert_row, row

versions = st.lists(st.integers(0, 9), max_size=4)


@settings(deadline=None)
@given(st.lists(st.none() | versions, min_size=1, max_size=6), st.integers(0, 12), st.integers(0, 5))
def test_oldest_action_decides(rows, policy_version, max_staleness):
    batch = batch_of(
        [
            expert_row(str(index)) if of_row is None else row(str(index), [5] * len(of_row), policy_version=of_row)
            for index, of_row in enumerate(rows)
        ]
    )
    found = VersionRange.from_batch(batch)
    expected_oldest = [min(of_row, default=NO_VERSION) if of_row else NO_VERSION for of_row in rows]
    assert found.oldest.tolist() == expected_oldest
    assert found.newest.tolist() == [max(of_row) if of_row else NO_VERSION for of_row in rows]
    expected = [max(policy_version - min(of_row), 0) if of_row else 0 for of_row in rows]
    assert staleness(policy_version, found.oldest).tolist() == expected
    assert stale_rows(found.oldest, policy_version - max_staleness).tolist() == [
        value > max_staleness for value in expected
    ]


def test_rows_of_a_slice_are_those_of_the_slice():
    batch = batch_of([row(str(index), [5, 6], policy_version=[index, index + 2]) for index in range(5)])
    found = VersionRange.from_batch(batch.slice(2, 2))
    np.testing.assert_array_equal(found.oldest, [2, 3])
    np.testing.assert_array_equal(found.newest, [4, 5])
