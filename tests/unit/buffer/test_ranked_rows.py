"""Ranked rows against a plain list."""

from __future__ import annotations

import numpy as np
import pytest

from buffer.sampling.ranked_rows import RankedRows


@pytest.mark.parametrize("from_the_front", [0.0, 0.5, 1.0])
def test_ranks_are_places_in_the_list_of_those_that_are_left(from_the_front):
    """Thousands of rows, so that gaps are closed several times, in blocks of the real size."""
    generator = np.random.default_rng(0)
    ranked, plain, next_row = RankedRows(), np.empty(0, dtype=np.int64), 0
    for _ in range(60):
        new = next_row + np.flatnonzero(generator.random(300) < 0.7)
        next_row += 300
        ranked.append(new)
        plain = np.concatenate([plain, new])
        num_gone = int(generator.integers(0, len(plain) + 1)) // 4
        gone = plain[:num_gone] if generator.random() < from_the_front else generator.choice(plain, num_gone, False)
        ranked.remove(gone)
        plain = np.setdiff1d(plain, gone)
        assert len(ranked) == len(plain)
        assert ranked.oldest == plain[0]
        ranks = generator.permutation(len(plain))
        np.testing.assert_array_equal(ranked.at_ranks(ranks), plain[ranks])
    ranked.remove(plain)
    assert len(ranked) == 0
    ranked.append(np.array([next_row]))
    assert ranked.at_ranks(np.array([0])).tolist() == [next_row]
