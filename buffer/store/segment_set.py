"""The sealed segments of a shard by row, and how many of their rows are still live."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from buffer.store.manifest import SegmentEntry

Int64 = npt.NDArray[np.int64]

SMALL_SHARE = 0.25
"""A segment below this share of the size of a full one is small: it may join a compaction though all its rows count."""


class SegmentSet:
    """Counts are kept up to date as rows cease to be live, so that nothing has to look at all rows."""

    def __init__(self) -> None:
        self._entries: list[SegmentEntry] = []
        self._num_live: list[int] = []
        self._first_rows: Int64 = np.empty(0, dtype=np.int64)

    @property
    def entries(self) -> tuple[SegmentEntry, ...]:
        """By row."""
        return tuple(self._entries)

    def add(self, entry: SegmentEntry, num_live: int) -> None:
        """A segment whose rows come after all others."""
        self._entries.append(entry)
        self._num_live.append(num_live)
        self._index()

    def replace(self, old: Sequence[SegmentEntry], new: SegmentEntry | None) -> None:
        """Neighbours give way to one segment that holds all their live rows, or, where they have none, to nothing."""
        at = self._entries.index(old[0])
        assert self._entries[at : at + len(old)] == list(old), "only neighbours are replaced"
        num_live = sum(self._num_live[at : at + len(old)])
        assert new is not None or num_live == 0, "live rows stay"
        self._entries[at : at + len(old)] = [] if new is None else [new]
        self._num_live[at : at + len(old)] = [] if new is None else [num_live]
        self._index()

    def lose(self, rows: Int64) -> None:
        """These rows are no longer live; those of the open segment are passed over."""
        if not self._entries:
            return
        sealed = rows[rows <= self._entries[-1].last_row]
        owners = np.searchsorted(self._first_rows, sealed, side="right") - 1
        for owner, count in zip(*np.unique(owners, return_counts=True), strict=True):
            self._num_live[owner] -= int(count)

    @property
    def has_dead(self) -> bool:
        """Whether there is a segment without a live row."""
        return 0 in self._num_live

    def unneeded(self, pinned_rows: Int64) -> list[SegmentEntry]:
        """Segments of which no row is live or pinned. pinned_rows: ascending."""
        dead = [entry for entry, count in zip(self._entries, self._num_live, strict=True) if count == 0]
        return [entry for entry in dead if _num_within(pinned_rows, entry) == 0]

    def worth_rewriting(self, pinned_rows: Int64, below_share: float, segment_bytes: int) -> list[SegmentEntry]:
        """Neighbours whose live and pinned rows fit into one segment; empty where a rewriting would gain little.

        A run holds at least one segment of which less than `below_share` is needed, or four small ones. Small
        neighbours join, so that compaction does not leave ever more small files behind.
        """
        best: list[SegmentEntry] = []
        run: list[SegmentEntry] = []
        run_bytes, num_sparse = 0.0, 0
        for entry, live in zip(self._entries, self._num_live, strict=True):
            needed = min(live + _num_within(pinned_rows, entry), entry.num_rows) / entry.num_rows
            is_sparse = needed < below_share
            needed_bytes = needed * entry.size_bytes
            joins = is_sparse or entry.size_bytes < SMALL_SHARE * segment_bytes
            if not joins or run_bytes + needed_bytes > segment_bytes:
                run, run_bytes, num_sparse = [], 0.0, 0
            if joins:
                run = [*run, entry]
                run_bytes += needed_bytes
                num_sparse += is_sparse
                if (num_sparse or len(run) >= 1 / SMALL_SHARE) and len(run) > len(best):
                    best = run
        return best

    def _index(self) -> None:
        self._first_rows = np.array([entry.first_row for entry in self._entries], dtype=np.int64)


def _num_within(rows: Int64, entry: SegmentEntry) -> int:
    first, end = np.searchsorted(rows, [entry.first_row, entry.last_row + 1])
    return int(end - first)
