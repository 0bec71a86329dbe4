"""Random access to rows that lie in many record batches, on the heap or in mapped files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Int64 = npt.NDArray[np.int64]

MERGED_ROWS = 4096
"""Heap batches are merged up to this many rows."""

WHOLE_CHUNK_BYTES = 2**20
"""Up to this size a batch joins a gather as a whole: copying it costs less than one more call of `take`."""


@dataclass(frozen=True)
class _Chunk:
    first_row: int
    batch: pa.RecordBatch
    size_bytes: int
    on_heap: bool

    @property
    def end_row(self) -> int:
        return self.first_row + int(self.batch.num_rows)


class RowTable:
    """Batches by row number. Row numbers grow with each append and are never used twice; rows may be removed.

    Appended batches are merged with their neighbours as in a log-structured merge tree (each byte is copied
    O(log MERGED_ROWS) times), because a gather costs time per batch it touches.
    """

    def __init__(self) -> None:
        self._chunks: list[_Chunk] = []
        self._starts: Int64 | None = None  # first row of each chunk, built on demand

    def append(self, first_row: int, batches: Sequence[pa.RecordBatch], on_heap: bool) -> None:
        """Add consecutive batches after the last row. on_heap: whether they may be merged (by a copy)."""
        assert not self._chunks or first_row >= self._chunks[-1].end_row, "rows are appended in order"
        for batch in batches:
            self._chunks.append(_Chunk(first_row, batch, batch.nbytes, on_heap))
            first_row += batch.num_rows
            self._merge_last()
        self._starts = None

    def batches(self, first_row: int) -> list[pa.RecordBatch]:
        """Batches from `first_row`, where a batch begins, to the end."""
        return [chunk.batch for chunk in self._chunks if chunk.first_row >= first_row]

    def remove(self, first_row: int, end_row: int) -> None:
        """Forget the batches that lie in [first_row, end_row)."""
        self._chunks = [chunk for chunk in self._chunks if chunk.first_row < first_row or chunk.end_row > end_row]
        self._starts = None

    def holds(self, rows: Int64) -> bool:
        """Whether all rows with these numbers are in the table."""
        ends = np.array([chunk.end_row for chunk in self._chunks], dtype=np.int64)
        starts = self._chunk_starts()
        owners = np.searchsorted(starts, rows, side="right") - 1
        return bool(len(starts)) and bool(np.all((owners >= 0) & (rows < ends[owners])))

    def take(self, rows: Int64) -> pa.RecordBatch:
        """Copy of the rows with these numbers, in this order; all of them are in the table, and there is one."""
        starts = self._chunk_starts()
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        owners = np.searchsorted(starts, ordered, side="right") - 1
        touched, begins, counts = np.unique(owners, return_index=True, return_counts=True)
        parts: list[pa.RecordBatch] = []
        positions = np.empty(len(rows), dtype=np.int64)
        base = 0
        for owner, begin, count in zip(touched.tolist(), begins.tolist(), counts.tolist(), strict=True):
            chunk = self._chunks[owner]
            local = ordered[begin : begin + count] - chunk.first_row
            part = chunk.batch
            if chunk.size_bytes > WHOLE_CHUNK_BYTES and count < part.num_rows:
                part = part.take(pa.array(local))
                local = np.arange(count)
            parts.append(part)
            positions[order[begin : begin + count]] = base + local
            base += part.num_rows
        gathered = parts[0] if len(parts) == 1 else pa.concat_batches(parts)
        taken: pa.RecordBatch = gathered.take(pa.array(positions))
        return taken

    def _chunk_starts(self) -> Int64:
        if self._starts is None:
            self._starts = np.array([chunk.first_row for chunk in self._chunks], dtype=np.int64)
        return self._starts

    def _merge_last(self) -> None:
        while len(self._chunks) > 1:
            left, right = self._chunks[-2:]
            num_rows = left.batch.num_rows + right.batch.num_rows
            if not (left.on_heap and right.on_heap and left.end_row == right.first_row):
                return
            if left.batch.num_rows > 2 * right.batch.num_rows or num_rows > MERGED_ROWS:
                return
            batch = pa.concat_batches([left.batch, right.batch])
            self._chunks[-2:] = [_Chunk(left.first_row, batch, batch.nbytes, on_heap=True)]
