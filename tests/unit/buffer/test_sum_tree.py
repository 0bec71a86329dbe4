"""The sum tree against plain cumulative sums."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.sampling import sum_tree
from buffer.sampling.sum_tree import SumTree

# Whole numbers, so that sums are exact in any order.
weights_lists = st.lists(st.integers(0, 4), max_size=25)


def assert_as_plain_sums(tree, weights):
    assert tree.weights.tolist() == weights
    assert tree.total == sum(weights)
    targets = np.arange(0, sum(weights), 0.5)
    np.testing.assert_array_equal(tree.find(targets), np.searchsorted(np.cumsum(weights), targets, side="right"))


@settings(deadline=None, max_examples=150)
@given(appended=st.lists(weights_lists, min_size=1, max_size=5), data=st.data())
def test_finds_what_cumulative_sums_find(appended, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sum_tree, "_FANOUT", 3)  # four levels at most
        tree = SumTree()
        weights = []
        for new in appended:
            tree.append(np.array(new, dtype=np.float64))
            weights += new
            assert_as_plain_sums(tree, weights)
            slots = data.draw(st.lists(st.sampled_from(range(len(weights))), unique=True)) if weights else []
            for slot in slots:
                weights[slot] = data.draw(st.integers(0, 4))
            tree.put(np.array(slots, dtype=np.int64), np.array([weights[slot] for slot in slots], dtype=np.float64))
            assert_as_plain_sums(tree, weights)
        kept = [slot for slot, weight in enumerate(weights) if weight]
        tree.keep(np.array(kept, dtype=np.int64))
        assert_as_plain_sums(tree, [weights[slot] for slot in kept])


def test_a_target_at_the_very_end_finds_the_last_place_that_is_taken():
    tree = SumTree()
    weights = np.full(3000, 0.1)
    weights[2000:] = 0.0
    tree.append(weights)
    assert tree.find(np.array([np.nextafter(tree.total, 0.0), tree.total])).tolist() == [1999, 1999]


def test_weights_over_hundreds_of_orders_of_magnitude_are_drawn_in_full_and_put_back():
    tree = SumTree()
    tree.append(2.0 ** -np.arange(900.0))
    before = tree.weights.copy(), tree.total
    drawn = tree.sample(200, np.random.default_rng(0))
    assert len(set(drawn.tolist())) == 200
    assert drawn.max() < 260, "each has half the weight of the one before it"
    np.testing.assert_array_equal(tree.weights, before[0])
    assert tree.total == before[1]
