"""Ragged rows of token ids as two flat arrays, so that nothing here loops over tokens or rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Ragged:
    """R rows of ids. offsets: [R+1], starts at 0; row r owns values[offsets[r]:offsets[r+1]]. values: [P]."""

    offsets: Int64
    values: Int32

    @classmethod
    def from_arrow(cls, column: pa.ListArray | pa.LargeListArray | pa.ChunkedArray) -> Ragged:
        """View a list column without nulls (a chunked one is joined first)."""
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks()
        offsets = column.offsets.to_numpy().astype(np.int64)
        return cls(offsets - offsets[0], column.flatten().to_numpy().astype(np.int32, copy=False))

    @classmethod
    def from_lengths(cls, lengths: Int64, values: Int32) -> Ragged:
        """Rows of the given lengths over `values`."""
        return cls(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), values)

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int64:
        """[R] ids per row."""
        return np.diff(self.offsets)

    @property
    def last_values(self) -> Int32:
        """[R] the last id of each row; rows must not be empty."""
        return self.values[self.offsets[1:] - 1]

    def rows(self) -> list[Int32]:
        """The rows as views, for callers that pass one row at a time (an engine's requests)."""
        return np.split(self.values, self.offsets[1:-1]) if self.num_rows else []

    def to_arrow(self) -> pa.ListArray:
        """An Arrow list<int32> column."""
        return pa.ListArray.from_arrays(pa.array(self.offsets, pa.int32()), pa.array(self.values, pa.int32()))


def index_ranges(starts: Int64, lengths: Int64) -> Int64:
    """Indexes starts[i], ..., starts[i] + lengths[i] - 1 for every i, one after the other: [sum(lengths)]."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    indexes: Int64 = np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
    return indexes
