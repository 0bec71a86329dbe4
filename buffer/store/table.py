"""The index in memory of a shard's rows: numpy columns with a slot per row number, and the known ids."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from buffer.store.catalog import FACTS
from buffer.trajectory.schema import SOURCES
from buffer.trajectory.staleness import Bool, Int32, Int64

Float32 = npt.NDArray[np.float32]
UInt64 = npt.NDArray[np.uint64]

NO_ROWS: Int64 = np.empty(0, np.int64)

RUNS = ("id", "prompt_ids", "actions", "executed", "logprobs", "policy_version", "features")
"""Columns of texts and lists: each row has a run of bytes in each."""

FIRST_PRIORITY = 1.0
"""Priority of a row that is inserted when no other row of its source is live. Only ratios of priorities matter."""

NOT_STORED = -1
"""Stands for a segment's number where the bytes of a row are deleted."""

REMEMBERED_ROWS = 65_536
"""Number of deleted rows whose ids are still known."""

_COLUMNS = (*(FACTS.names or ()), "segment", "live", "times_sampled", "context", "reward", "views")
_FEWEST_SLOTS = 1024
_MOST_RECENT_IDS = 65_536


class ReplayTable:
    """All rows from number `base` on, live or not, one slot each.

    Columns, with a value per slot: hash (of the id), created_us, oldest_version, priority, source (index into SOURCES);
    segment (NOT_STORED: its bytes are deleted); live (whether a sample may give it); times_sampled.
    `buffer.store.gather` fills the others: views (four numbers for each run), context, reward.
    """

    def __init__(self) -> None:
        self.base = 0
        self._size = 0
        self.hash: UInt64 = np.zeros(_FEWEST_SLOTS, np.uint64)
        self.created_us: Int64 = np.zeros(_FEWEST_SLOTS, np.int64)
        self.oldest_version: Int32 = np.zeros(_FEWEST_SLOTS, np.int32)
        self.priority: Float32 = np.zeros(_FEWEST_SLOTS, np.float32)
        self.source: npt.NDArray[np.uint8] = np.zeros(_FEWEST_SLOTS, np.uint8)
        self.segment: Int32 = np.zeros(_FEWEST_SLOTS, np.int32)
        self.live: Bool = np.zeros(_FEWEST_SLOTS, np.bool_)
        self.times_sampled: Int32 = np.zeros(_FEWEST_SLOTS, np.int32)
        self.context: Int32 = np.zeros(_FEWEST_SLOTS, np.int32)
        self.reward: Float32 = np.zeros(_FEWEST_SLOTS, np.float32)
        self.views: Int32 = np.zeros((_FEWEST_SLOTS, len(RUNS), 4), np.int32)
        self._num_live = [0] * len(SOURCES)
        self._live_rows: dict[str, Int64] = {}
        self.live_in: Counter[int] = Counter()
        """Live rows of each segment."""

    @property
    def filled(self) -> slice:
        """The slots in use."""
        return slice(0, self._size)

    @property
    def is_stored(self) -> Bool:
        """[n] of each slot in use, whether the bytes of its row are there."""
        stored: Bool = self.segment[self.filled] != NOT_STORED
        return stored

    def slots(self, rows: Int64) -> Int64:
        """[n] slots of rows that the table knows."""
        return rows - self.base

    def is_known(self, rows: Int64) -> Bool:
        """[n] whether the table has a slot for each of these rows."""
        known: Bool = self.slots(rows).view(np.uint64) < self._size  # a negative one is too large then
        return known

    def add(self, rows: Int64, facts: npt.NDArray[np.void], segments: Int64 | int) -> None:
        """Add stored, live rows. rows: [n] ascending, above all earlier ones; facts: [n] of `FACTS`; segments: of each
        row."""
        if not self._size:
            self.base = int(rows[0])
        self._resize(int(rows[-1]) + 1)
        slots = self.slots(rows)
        for name in facts.dtype.names or ():
            getattr(self, name)[slots] = facts[name]
        self.segment[slots], self.live[slots], self.times_sampled[slots] = segments, True, 0
        self._count(slots, 1)

    def num_live(self, source: str) -> int:
        """Live rows of `source`."""
        return self._num_live[SOURCES.index(source)]

    def live_rows(self, source: str) -> Int64:
        """[n] live rows of `source`, ascending; read-only."""
        if source not in self._live_rows:
            live = self.live[self.filled]
            if self.num_live(source) < sum(self._num_live):
                live = live & (self.source[self.filled] == SOURCES.index(source))
            self._live_rows[source] = np.flatnonzero(live) + self.base
        return self._live_rows[source]

    def oldest(self, source: str, count: int) -> Int64:
        """[count] oldest live rows of `source`, found without a scan of all rows; there must be so many."""
        begin, width = int(self.live[self.filled].argmax()), count
        while True:
            window = slice(begin, min(begin + width, self._size))
            found = np.flatnonzero(self.live[window] & (self.source[window] == SOURCES.index(source)))
            if len(found) >= count:
                return found[:count] + (begin + self.base)
            width *= 2

    def is_live(self, rows: Int64) -> Bool:
        """[n] whether each row is live."""
        found = self.is_known(rows)
        found[found] = self.live[self.slots(rows[found])]
        return found

    def largest_priority(self, source: str) -> float:
        """Largest priority of the live rows of `source`; FIRST_PRIORITY where there is none."""
        rows = self.live_rows(source)
        return float(self.priority[self.slots(rows)].max()) if len(rows) else FIRST_PRIORITY

    def remove(self, rows: Int64) -> None:
        """Mark live rows as not live."""
        slots = self.slots(rows)
        self.live[slots] = False
        self._count(slots, -1)

    def move(self, rows: Int64, segment: int) -> None:
        """Record the new segment of the bytes of these rows; NOT_STORED: they are deleted."""
        slots = self.slots(rows)
        live = slots[self.live[slots]]
        self._count(live, -1)
        self.segment[slots] = segment
        self._count(live, 1)
        if segment == NOT_STORED:
            self._trim()

    def _count(self, slots: Int64, sign: int) -> None:
        """Count slots that became live (sign 1) or not live (-1)."""
        self._live_rows.clear()
        for index, count in enumerate(np.bincount(self.source[slots], minlength=len(SOURCES)).tolist()):
            self._num_live[index] += sign * count
        for number, count in zip(*np.unique(self.segment[slots], return_counts=True), strict=True):
            self.live_in[int(number)] += sign * int(count)

    def _resize(self, end_row: int) -> None:
        size = end_row - self.base
        if size > len(self.live):
            self._copy(0, max(2 * len(self.live), size))
        self.segment[self._size : size] = NOT_STORED  # numbers that no row here has
        self._size = size

    def _trim(self) -> None:
        """Remove the rows at the front whose bytes are deleted, once they are half of all."""
        is_stored = self.is_stored
        front = int(is_stored.argmax()) if is_stored.any() else self._size
        if front > max(self._size // 2, _FEWEST_SLOTS):
            self._copy(front, max(_FEWEST_SLOTS, 2 * (self._size - front)))
            self.base, self._size = self.base + front, self._size - front

    def _copy(self, front: int, num_slots: int) -> None:
        """Into new columns, without the first slots."""
        for name in _COLUMNS:
            old = getattr(self, name)
            column = np.zeros((num_slots, *old.shape[1:]), old.dtype)
            column[: self._size - front] = old[front : self._size]
            setattr(self, name, column)


class KnownIds:
    """The ids that a shard has seen: those of stored rows, and of recently deleted rows.

    An insert whose answer was lost is repeated, and its rows may have been deleted meanwhile. The shard remembers their
    ids for a while, so that it does not store them twice. It keeps a 64-bit hash of each id. With a million ids, two of
    them share a hash in about 3 of 10^8 cases: the later row is then counted as present.
    """

    def __init__(self, table: ReplayTable, deleted: UInt64) -> None:
        """table: of the stored rows. deleted: [n] hashes of deleted rows, the newest last."""
        self._table = table
        self._deleted = deleted[-REMEMBERED_ROWS:]
        self._merge()

    def add(self, hashes: UInt64) -> None:
        """Add ids of new rows."""
        self._recent.update(hashes.tolist())

    def delete(self, hashes: UInt64) -> None:
        """Mark ids as those of deleted rows."""
        self._deleted = np.concatenate([self._deleted, hashes])[-REMEMBERED_ROWS:]

    def knows(self, hashes: UInt64) -> Bool:
        """[n] whether each id is known; of deleted rows, the last REMEMBERED_ROWS are known and older ones may be."""
        if len(self._recent) > _MOST_RECENT_IDS:
            self._merge()
        known: Bool = self._sorted[np.searchsorted(self._sorted, hashes)] == hashes
        if not self._recent.isdisjoint(hashes.tolist()):
            known |= np.fromiter((each in self._recent for each in hashes.tolist()), np.bool_, len(hashes))
        return known

    def _merge(self) -> None:
        stored = self._table.hash[self._table.filled][self._table.is_stored]
        last = np.array([np.iinfo(np.uint64).max], np.uint64)  # so that each hash has a place
        self._sorted = np.sort(np.concatenate([stored, self._deleted, last]))
        self._recent: set[int] = set()


def hash_ids(ids: pa.StringArray) -> UInt64:
    """[n] xxh3-64 of each id."""
    digest = xxhash.xxh3_64_intdigest
    return np.fromiter((digest(id_) for id_ in ids.view(pa.binary()).to_pylist()), np.uint64, len(ids))
