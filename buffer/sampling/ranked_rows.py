"""Rows in ascending order, found by their rank: 0 is the oldest row that is there.

Rows mostly leave in the order in which they came (capacity, age, staleness), and then a rank is a place. Rows that
leave from the middle (drawn as often as they may be) leave gaps, and ranks are looked up by how many rows are left in
each block of 64 places.
"""

from __future__ import annotations

import numpy as np

from buffer.sampling.columns import Column, Int64

_BLOCK = 64

_FEWEST_GAPS = 1024
"""Removed rows leave gaps; up to this many are not worth closing."""


class RankedRows:
    """Rows appended with ascending numbers and removed anywhere.

    Both cost O(1) per row; looking up k ranks of n rows costs O(k) without gaps and O(n / 64 + k) with some.
    """

    def __init__(self) -> None:
        self._rows = Column(np.int64)
        self._is_here = Column(np.bool_)
        self._counts = Column(np.int64)  # of rows that are here, by block of places
        self._ends: Int64 | None = None  # ranks at which the blocks end, built on demand
        self._front = 0  # no row before this place is here
        self._num_gaps = 0  # behind it

    def __len__(self) -> int:
        return len(self._rows) - self._front - self._num_gaps

    @property
    def oldest(self) -> int:
        """The smallest row number; there is a row."""
        return int(self._rows.values[self._front])

    def append(self, rows: Int64) -> None:
        """Add rows with numbers above all before."""
        begin_block = len(self._rows) // _BLOCK
        self._rows.append(rows)
        self._is_here.append(np.ones(len(rows), dtype=np.bool_))
        self._count_blocks(begin_block)

    def remove(self, rows: Int64) -> None:
        """Take out these distinct rows; all of them are here."""
        places = np.searchsorted(self._rows.values, rows)
        is_here = self._is_here.values
        assert np.array_equal(self._rows.values[places], rows), "only rows that were appended are taken out"
        assert is_here[places].all(), "rows are taken out once"
        is_here[places] = False
        np.subtract.at(self._counts.values, places // _BLOCK, 1)
        self._ends = None
        ahead = is_here[self._front :]
        passed = int(ahead.argmax()) if len(rows) < len(self) else len(ahead)  # `argmax` stops at the first one
        self._front += passed
        self._num_gaps += len(rows) - passed
        if self._front + self._num_gaps > max(len(self), _FEWEST_GAPS):
            self._close_gaps()

    def at_ranks(self, ranks: Int64) -> Int64:
        """[k] the rows with these ranks, each in [0, n)."""
        if not self._num_gaps:
            return self._rows.values[self._front + ranks]
        if self._ends is None:
            self._ends = np.cumsum(self._counts.values)
        blocks = np.searchsorted(self._ends, ranks, side="right")
        within = ranks - (self._ends[blocks] - self._counts.values[blocks])
        places = blocks[:, None] * _BLOCK + np.arange(_BLOCK)
        here = self._is_here.values.take(places, mode="clip")  # the last block may be longer than the column
        ordinals = np.cumsum(here, axis=1, dtype=np.int8)
        found = np.argmax(ordinals > within[:, None], axis=1)
        at_ranks: Int64 = self._rows.values[blocks * _BLOCK + found]
        return at_ranks

    def _count_blocks(self, begin_block: int) -> None:
        """Count anew from this block on."""
        is_here = self._is_here.values[begin_block * _BLOCK :]
        self._counts.cut(begin_block)
        if len(is_here):
            self._counts.append(np.add.reduceat(is_here, np.arange(0, len(is_here), _BLOCK), dtype=np.int64))
        self._ends = None

    def _close_gaps(self) -> None:
        kept = np.flatnonzero(self._is_here.values)
        self._rows.keep(kept)
        self._is_here.keep(kept)
        self._front = self._num_gaps = 0
        self._count_blocks(0)
