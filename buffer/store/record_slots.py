"""Row numbers, ascending, with a record of each: two arrays that grow at the end and shrink at the front."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

_FEWEST = 1024


class RecordSlots:
    """A slot is the place of a row among those that are here. Records are what their owner makes of them."""

    def __init__(self) -> None:
        self._rows: Int64 = np.empty(_FEWEST, dtype=np.int64)
        self._records: Int32 = np.empty((_FEWEST, 0), dtype=np.int32)
        self._begin = self._end = 0

    def __len__(self) -> int:
        return self._end - self._begin

    @property
    def rows(self) -> Int64:
        """[n] row numbers."""
        return self._rows[self._begin : self._end]

    @property
    def records(self) -> Int32:
        """[n, lanes] to read and to write; good until rows come or go."""
        return self._records[self._begin : self._end]

    def widen(self, num_lanes: int) -> None:
        """Have records of another width, all of them to be written anew."""
        self._records = np.empty((len(self._rows), num_lanes), dtype=np.int32)

    def append(self, rows: Int64) -> None:
        """Add rows with numbers above all before; what their records hold is left to chance."""
        assert not len(self) or rows[0] > self._rows[self._end - 1], "rows are appended in order"
        if self._end + len(rows) > len(self._rows):
            self._rebuild([(self.rows, self.records)], len(self) + len(rows))
        self._rows[self._end : self._end + len(rows)] = rows
        self._end += len(rows)

    def replace(self, begin: int, end: int, rows: Int64) -> None:
        """Put rows in the place of the slots [begin, end); what their records hold is left to chance."""
        if begin == 0 and not len(rows):  # as the oldest rows go
            self._begin += end
            if len(self) >= self._begin:
                return
        new = (rows, np.empty((len(rows), self._records.shape[1]), dtype=np.int32))
        old_rows, old_records = self.rows, self.records
        if begin == 0 and not len(rows):
            begin = end = 0
        kept = [(old_rows[:begin], old_records[:begin]), new, (old_rows[end:], old_records[end:])]
        self._rebuild(kept, len(old_rows) - (end - begin) + len(rows))

    def find(self, rows: Int64) -> Int64:
        """[k] slots of these rows; -1 where a row is not here."""
        present = self.rows
        if not len(present):
            return np.full(len(rows), -1)
        last = len(present) - 1
        if present[last] - present[0] == last:  # numbers without a gap
            slots = rows - present[0]
            np.minimum(slots, last, out=slots)
            np.maximum(slots, 0, out=slots)
        else:
            slots = np.minimum(np.searchsorted(present, rows), last)
        return np.where(present[slots] == rows, slots, -1)

    def _rebuild(self, parts: list[tuple[Int64, Int32]], num_rows: int) -> None:
        """Move the parts into new arrays with room for `num_rows` and as many more."""
        rows: Int64 = np.empty(max(_FEWEST, 2 * num_rows), dtype=np.int64)
        records: Int32 = np.empty((len(rows), self._records.shape[1]), dtype=np.int32)
        at = 0
        for own_rows, own_records in parts:
            rows[at : at + len(own_rows)] = own_rows
            records[at : at + len(own_rows)] = own_records
            at += len(own_rows)
        self._rows, self._records, self._begin, self._end = rows, records, 0, at
