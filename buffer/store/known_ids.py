"""Which ids a shard has seen: those of stored rows, and of the rows that were deleted last.

An insert whose answer was lost is repeated, and its rows may have been removed and deleted meanwhile; they are
remembered for a while so that they are not taken for new ones. What is kept of an id is a 64-bit hash. Two ids share
one in some 3 of 10^8 cases for a million ids: the one that comes later is then taken for present.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

UInt64 = npt.NDArray[np.uint64]
Bool = npt.NDArray[np.bool_]

REMEMBERED_ROWS = 65_536
"""Deleted rows whose ids are still known."""

_MOST_RECENT = 65_536


class KnownIds:
    """A sorted array of hashes, and a set of those that came since it was made."""

    def __init__(self, stored: Callable[[], UInt64], deleted: UInt64) -> None:
        """stored: gives the hashes of all stored rows. deleted: [n] of deleted ones, the last one last."""
        self._stored = stored
        self._deleted = deleted[-REMEMBERED_ROWS:]
        self._merge()

    def add(self, hashes: UInt64) -> None:
        """Ids of rows that are stored from now on."""
        self._recent.update(hashes.tolist())

    def delete(self, hashes: UInt64) -> None:
        """Ids of rows that are stored no longer."""
        self._deleted = np.concatenate([self._deleted, hashes])[-REMEMBERED_ROWS:]

    def knows(self, hashes: UInt64) -> Bool:
        """[n] whether each id is known; of all deleted ones, those deleted last are, and older ones may be."""
        if len(self._recent) > _MOST_RECENT:
            self._merge()
        known: Bool = np.zeros(len(hashes), np.bool_)
        if len(self._sorted):
            places = np.minimum(np.searchsorted(self._sorted, hashes), len(self._sorted) - 1)
            known = self._sorted[places] == hashes
        if not self._recent.isdisjoint(hashes.tolist()):
            known |= np.fromiter((each in self._recent for each in hashes.tolist()), np.bool_, len(hashes))
        return known

    def _merge(self) -> None:
        self._sorted = np.sort(np.concatenate([self._stored(), self._deleted]))
        self._recent: set[int] = set()


def hash_ids(ids: pa.StringArray) -> UInt64:
    """[n] xxh3-64 of each id."""
    digest = xxhash.xxh3_64_intdigest
    return np.fromiter((digest(id_) for id_ in ids.view(pa.binary()).to_pylist()), np.uint64, len(ids))
