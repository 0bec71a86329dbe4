"""Which ids a shard has seen: those of its live rows, and of the rows removed last.

An insert whose answer was lost is repeated, and its rows may have been removed meanwhile; they are remembered for a
while so that they are not taken for new ones. Per live row 24 to 48 bytes are kept: a hash of the id and the row's
number, by which the id itself is looked up where hashes agree. (Two ids with one 64-bit hash, some 3 in 10^8 for a
million ids: the one of them that came later is then not recognised when it is repeated.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
Bool = npt.NDArray[np.bool_]

REMEMBERED_ROWS = 65_536
"""Removed rows whose ids are still known."""

_NO_HASH = np.uint64(0)  # of a slot that was never used; no id has it
_FREED = -1  # in the place of a row; the hash stays, since others may have been put behind it
_LARGEST_LOAD = 0.6
_FEWEST_SLOTS = 1024
_WINDOW = 16  # slots are looked at so many at a time, since a step of numpy costs more than a slot


class KnownIds:
    """A hash table with open addressing (linear probing) in arrays; every step works on all ids of a call at once."""

    def __init__(self, ids_of: Callable[[Int64], pa.StringArray], remembered_rows: int = REMEMBERED_ROWS) -> None:
        """ids_of: gives the ids of live rows."""
        self._ids_of = ids_of
        self._remembered_rows = remembered_rows
        self._removed: deque[tuple[Int64, pa.StringArray]] = deque()
        self._num_removed = 0
        self._allocate(_FEWEST_SLOTS)

    def add(self, hashes: UInt64, rows: Int64) -> None:
        """Ids that are not known yet, of rows that are live. hashes: see `hash_ids`."""
        self._insert(hashes, rows)

    def remove(self, ids: pa.StringArray, rows: Int64) -> None:
        """The rows are no longer live; forgets the ids of those removed longest ago. A null id was never known."""
        if ids.null_count:
            rows = rows[ids.is_valid().to_numpy(zero_copy_only=False)]
            ids = ids.drop_null()
        self._removed.append((rows, ids))
        self._num_removed += len(rows)
        while self._num_removed > self._remembered_rows:
            old_rows, old_ids = self._removed.popleft()
            self._num_removed -= len(old_rows)
            self._delete(hash_ids(old_ids), old_rows)

    def knows(self, ids: pa.StringArray, hashes: UInt64) -> Bool:
        """[n] whether each id is that of a live row or of one removed lately. hashes: see `hash_ids`."""
        known: Bool = np.zeros(len(ids), dtype=np.bool_)
        rows = self._find(hashes)
        alike = np.flatnonzero(rows >= 0)
        if len(alike):
            known[alike] = pc.equal(ids.take(pa.array(alike)), self._lookup(rows[alike])).to_numpy(zero_copy_only=False)
        return known

    def _lookup(self, rows: Int64) -> pa.StringArray:
        """Ids of these rows."""
        removed_rows = np.concatenate([rows[:0], *(part for part, _ in self._removed)])
        removed_ids = pa.concat_arrays([pa.array([], pa.string()), *(part for _, part in self._removed)])
        order = np.argsort(removed_rows, kind="stable")
        at = np.searchsorted(removed_rows[order], rows)
        is_removed = at < len(order)
        is_removed[is_removed] = removed_rows[order[at[is_removed]]] == rows[is_removed]
        live_ids = self._ids_of(rows[~is_removed])
        both = pa.concat_arrays([live_ids, removed_ids.take(pa.array(order[at[is_removed]]))])
        places = np.empty(len(rows), dtype=np.int64)
        places[~is_removed] = np.arange(len(live_ids))
        places[is_removed] = np.arange(len(live_ids), len(rows))
        return both.take(pa.array(places))

    def _allocate(self, num_slots: int) -> None:
        self._hash: UInt64 = np.zeros(num_slots, dtype=np.uint64)
        self._row: Int64 = np.full(num_slots, _FREED, dtype=np.int64)
        self._num_used = 0  # freed ones included

    def _insert(self, hashes: UInt64, rows: Int64) -> None:
        if self._num_used + len(rows) > _LARGEST_LOAD * len(self._row):
            self._rebuild(len(rows))
        pending = np.arange(len(rows))
        slots = self._first_slots(hashes)
        while len(pending):
            windows = self._windows(slots)
            is_empty = self._hash[windows] == _NO_HASH
            nearest = np.arange(len(windows)), is_empty.argmax(axis=1)
            wanted, has_place = windows[nearest], is_empty[nearest]
            # Where several want the same slot the last one written has it, and the others look again.
            self._row[wanted[has_place]] = rows[pending[has_place]]
            settled = has_place & (self._row[wanted] == rows[pending])
            self._hash[wanted[settled]] = hashes[pending[settled]]
            slots = np.where(has_place, slots, slots + _WINDOW)[~settled]
            pending = pending[~settled]
        self._num_used += len(rows)

    def _find(self, hashes: UInt64) -> Int64:
        """[n] row with this hash, or a negative number."""
        found = np.full(len(hashes), _FREED, dtype=np.int64)
        pending = np.arange(len(hashes))
        slots = self._first_slots(hashes)
        while len(pending):
            windows = self._windows(slots)
            present = self._hash[windows]
            goes_on = present.all(axis=1)  # no slot was never used
            if (matches := present == hashes[pending, None]).any():
                rows = self._row[windows]
                matches &= rows >= 0
                has_match = matches.any(axis=1)
                found[pending[has_match]] = rows[has_match, matches[has_match].argmax(axis=1)]
                goes_on &= ~has_match
            pending, slots = pending[goes_on], slots[goes_on] + _WINDOW
        return found

    def _delete(self, hashes: UInt64, rows: Int64) -> None:
        pending = np.arange(len(hashes))
        slots = self._first_slots(hashes)
        while len(pending):
            windows = self._windows(slots)
            matches = self._row[windows] == rows[pending, None]
            goes_on = ~matches.any(axis=1)
            assert self._hash[windows[goes_on]].all(), "known ids go"
            self._row[windows[matches]] = _FREED
            pending, slots = pending[goes_on], slots[goes_on] + _WINDOW

    def _windows(self, slots: Int64) -> Int64:
        """[n, _WINDOW] slots to look at together, from `slots` on."""
        return (slots[:, None] + np.arange(_WINDOW)) & (len(self._row) - 1)

    def _first_slots(self, hashes: UInt64) -> Int64:
        return (hashes & np.uint64(len(self._row) - 1)).astype(np.int64)

    def _rebuild(self, num_more: int) -> None:
        used = self._row >= 0
        hashes, rows = self._hash[used], self._row[used]
        num_slots = _FEWEST_SLOTS
        while num_slots * _LARGEST_LOAD / 2 < len(rows) + num_more:
            num_slots *= 2
        self._allocate(num_slots)
        self._insert(hashes, rows)


def hash_ids(ids: pa.StringArray) -> UInt64:
    """[n] of each id, never 0."""
    as_bytes = ids.view(pa.binary()).to_pylist()
    hashes = np.array([xxhash.xxh3_64_intdigest(id_) for id_ in as_bytes], dtype=np.uint64)
    return np.maximum(hashes, np.uint64(1))
