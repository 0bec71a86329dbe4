"""The rows of one source that may be drawn, oldest first, with what a draw decides by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from buffer.staleness import VersionRange

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

_FIELDS = np.dtype([("row", np.int64), ("oldest_version", np.int32), ("created_us", np.int64), ("id", object)])


@dataclass(frozen=True)
class RowFacts:
    """What is kept in memory per row. row: number in the store; created_us: microseconds since the epoch."""

    records: np.ndarray[tuple[int], np.dtype[np.void]]

    @classmethod
    def from_batch(cls, batch: pa.RecordBatch, first_row: int) -> RowFacts:
        """Of a validated trajectory batch whose rows are numbered from `first_row`."""
        records = np.empty(batch.num_rows, dtype=_FIELDS)
        records["row"] = np.arange(first_row, first_row + batch.num_rows)
        records["oldest_version"] = VersionRange.from_batch(batch).oldest
        records["created_us"] = batch.column("created_at").cast(pa.int64()).to_numpy()
        records["id"] = batch.column("id").to_numpy(zero_copy_only=False)
        return cls(records)

    def where(self, mask: Bool) -> RowFacts:
        """The rows where `mask` [n] is True."""
        return self if mask.all() else RowFacts(self.records[mask])


class LiveRows:
    """A queue of rows: appended at the end, evicted from the front, dropped anywhere."""

    def __init__(self) -> None:
        self._records = np.empty(64, dtype=_FIELDS)
        self._start = 0
        self._stop = 0

    def __len__(self) -> int:
        return self._stop - self._start

    @property
    def rows(self) -> Int64:
        """[n] row numbers, ascending."""
        return self._live["row"]

    @property
    def oldest_versions(self) -> npt.NDArray[np.int32]:
        """[n] oldest policy version per row."""
        return self._live["oldest_version"]

    @property
    def created_us(self) -> Int64:
        """[n] time of creation, microseconds since the epoch."""
        return self._live["created_us"]

    @property
    def ids(self) -> list[str]:
        """[n] ids of the rows."""
        ids: list[str] = self._live["id"].tolist()
        return ids

    def append(self, facts: RowFacts) -> None:
        """Add rows, newer than all present."""
        count = len(facts.records)
        if self._stop + count > len(self._records):
            live = self._live
            self._records = np.empty(2 * (len(live) + count), dtype=_FIELDS)
            self._records[: len(live)] = live
            self._start, self._stop = 0, len(live)
        self._records[self._stop : self._stop + count] = facts.records
        self._stop += count

    def evict_oldest(self, count: int) -> list[str]:
        """Remove the `count` oldest rows; gives their ids."""
        removed = self._records[self._start : self._start + count]
        ids: list[str] = removed["id"].tolist()
        removed["id"] = None  # let the strings go
        self._start += count
        return ids

    def drop(self, mask: Bool) -> list[str]:
        """Remove the rows where `mask` [n] is True; gives their ids."""
        live = self._live
        ids: list[str] = live["id"][mask].tolist()
        kept = live[~mask]
        self._records[self._start : self._start + len(kept)] = kept
        self._records["id"][self._start + len(kept) : self._stop] = None
        self._stop = self._start + len(kept)
        return ids

    @property
    def _live(self) -> np.ndarray[tuple[int], np.dtype[np.void]]:
        return self._records[self._start : self._stop]
