"""Rows in ascending order with a weight each: found by number, or in proportion to their weight."""

from __future__ import annotations

import numpy as np

from buffer.sampling.columns import Column
from buffer.sampling.sum_tree import Float64, Int64, SumTree

_FEWEST_GAPS = 1024
"""Removed rows leave gaps; up to this many are not worth closing."""


class WeightedRows:
    """Rows appended with ascending numbers and removed anywhere, in O(log n) per row."""

    def __init__(self) -> None:
        self._rows = Column(np.int64)
        self._tree = SumTree()
        self._num_gaps = 0

    def __len__(self) -> int:
        return len(self._rows) - self._num_gaps

    def append(self, rows: Int64, weights: Float64) -> None:
        """Add rows with numbers above all before; weights are positive."""
        self._rows.append(rows)
        self._tree.append(weights)

    def remove(self, rows: Int64) -> None:
        """Take out these rows; all of them are here."""
        self._tree.put(self._slots(rows), 0.0)
        self._num_gaps += len(rows)
        if self._num_gaps > max(len(self), _FEWEST_GAPS):
            kept = np.flatnonzero(self._tree.weights)
            self._rows.keep(kept)
            self._tree.keep(kept)
            self._num_gaps = 0

    def put(self, rows: Int64, weights: Float64) -> None:
        """Replace the weights of these rows, which are distinct and all here."""
        self._tree.put(self._slots(rows), weights)

    def sample(self, count: int, generator: np.random.Generator) -> Int64:
        """[count] distinct rows; see `SumTree.sample`."""
        found: Int64 = self._rows.values[self._tree.sample(count, generator)]
        return found

    def _slots(self, rows: Int64) -> Int64:
        slots = np.searchsorted(self._rows.values, rows)
        assert np.array_equal(self._rows.values[slots], rows), "only rows that were appended are looked up"
        return slots
