"""Random access to rows that lie in many record batches, on the heap or in mapped files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from buffer.schema import ROW, rows_of
from buffer.store.gather import Part, gather
from buffer.store.gather_layout import GatherLayout
from buffer.store.gather_source import GatherSource

Int64 = npt.NDArray[np.int64]

MERGED_ROWS = 2**16
"""Heap batches are merged up to this many rows."""

MERGED_BATCHES = 8
"""So many at a time: a gather touches a few more batches, and a byte is copied a third as often as with two."""

_ABSENT = "a row that the table does not hold"


@dataclass(frozen=True)
class _Chunk:
    """rows: [n] numbers, ascending; is_dense: without gaps; division: see `RowTable.divide`."""

    source: GatherSource
    rows: Int64
    is_dense: bool
    on_heap: bool
    division: int

    @classmethod
    def of(cls, batch: pa.RecordBatch, on_heap: bool, division: int) -> _Chunk:
        rows = rows_of(batch)
        return cls(GatherSource(batch), rows, int(rows[-1] - rows[0]) + 1 == len(rows), on_heap, division)

    @property
    def batch(self) -> pa.RecordBatch:
        return self.source.batch

    def positions(self, rows: Int64) -> Int64:
        """[n] where these rows (ascending, at least one, none before the first) stand in the batch."""
        if self.is_dense:
            places: Int64 = rows - self.rows[0]
            assert places[-1] < len(self.rows), _ABSENT
            return places
        places = np.searchsorted(self.rows, rows)
        assert places[-1] < len(self.rows), _ABSENT
        assert np.array_equal(self.rows[places], rows), _ABSENT
        return places


class RowTable:
    """Stored batches (`buffer.schema.stored_schema`), found by the numbers in their `row` column.

    The numbers grow with each append, with gaps or without. A gather costs time per batch it touches, so before one
    heap batches are merged with their neighbours as in a log-structured merge tree: there are at most seven of about
    one size, and each byte is copied O(log MERGED_ROWS) times, or once where many batches came since the gather before.
    """

    def __init__(self) -> None:
        self._chunks: list[_Chunk] = []
        self._starts: Int64 | None = None  # first row of each chunk, built on demand
        self._first_unmerged: int | None = None  # the first row on the heap that came since batches were merged
        self._division = 0
        self._layout: GatherLayout | None = None  # of the columns, from the first gather on

    def append(self, batches: Sequence[pa.RecordBatch], on_heap: bool) -> None:
        """Add batches whose rows come after those in the table. on_heap: whether they may be merged (by a copy)."""
        for batch in batches:
            if batch.num_rows == 0:
                continue
            chunk = _Chunk.of(batch, on_heap, self._division)
            assert not self._chunks or chunk.rows[0] > self._chunks[-1].rows[-1], "rows are appended in order"
            self._chunks.append(chunk)
            if on_heap and self._first_unmerged is None:
                self._first_unmerged = int(chunk.rows[0])
        self._starts = None

    def divide(self) -> None:
        """Have no batch that is here merged with one that comes later."""
        self._division += 1

    def batches(self, first_row: int, end_row: int | None = None) -> list[pa.RecordBatch]:
        """The batches whose rows lie in [first_row, end_row), by row; end_row: None = to the end."""
        return [
            chunk.batch
            for chunk in self._chunks
            if chunk.rows[0] >= first_row and (end_row is None or chunk.rows[-1] < end_row)
        ]

    def remove(self, first_row: int, end_row: int) -> None:
        """Forget the batches whose rows lie in [first_row, end_row)."""
        self._chunks = [chunk for chunk in self._chunks if chunk.rows[0] < first_row or chunk.rows[-1] >= end_row]
        self._starts = None

    def replace(self, first_row: int, end_row: int, batches: Sequence[pa.RecordBatch], on_heap: bool) -> None:
        """Put `batches`, whose rows lie in [first_row, end_row), in the place of those that are there now."""
        self.remove(first_row, end_row)
        at = int(np.searchsorted(self._chunk_starts(), first_row))
        chunks = [_Chunk.of(batch, on_heap, self._division) for batch in batches if batch.num_rows]
        ordered = [*self._chunks[:at][-1:], *chunks, *self._chunks[at : at + 1]]
        for left, right in itertools.pairwise(ordered):
            assert left.rows[-1] < right.rows[0], "rows stay in order"
        self._chunks[at:at] = chunks
        if on_heap and chunks and self._first_unmerged is None:
            self._first_unmerged = int(chunks[0].rows[0])
        self._starts = None

    def holds(self, rows: Int64) -> bool:
        """Whether all rows with these numbers are in the table."""
        owners = self._owners(rows)
        if np.any(owners < 0):
            return False
        return all(
            np.isin(rows[owners == owner], self._chunks[owner].rows).all() for owner in np.unique(owners).tolist()
        )

    def take(self, rows: Int64) -> pa.RecordBatch:
        """Copy of the rows with these numbers, in this order, without the column of the numbers; all of them are in the
        table, and there is one.

        Raises:
            ValueError: see `gather`.
        """
        if self._first_unmerged is not None:
            self._merge_heap(self._first_unmerged)
        parts = self._parts(rows)
        if self._layout is None:
            schema = parts[0].source.batch.schema
            self._layout = GatherLayout(schema.remove(schema.get_field_index(ROW)), parts[0].source)
        return gather(self._layout, parts, len(rows))

    def ids(self, rows: Int64) -> pa.StringArray:
        """Ids of the rows with these numbers, in this order; all of them are in the table."""
        ids, places = [pa.array([], pa.string())], [np.empty(0, dtype=np.int64)]
        for part in self._parts(rows):
            ids.append(part.source.batch.column("id").take(pa.array(part.local)))
            places.append(part.at)
        return pa.concat_arrays(ids).take(pa.array(np.argsort(np.concatenate(places))))

    def _chunk_starts(self) -> Int64:
        if self._starts is None:
            self._starts = np.array([chunk.rows[0] for chunk in self._chunks], dtype=np.int64)
        return self._starts

    def _owners(self, rows: Int64) -> Int64:
        """[n] index of the chunk that holds each row, if any does; -1 before the first chunk."""
        return np.searchsorted(self._chunk_starts(), rows, side="right") - 1

    def _parts(self, rows: Int64) -> list[Part]:
        """Where the rows stand, by batch."""
        order = np.argsort(rows)
        ascending = rows[order]
        begins = np.searchsorted(ascending, self._chunk_starts()).tolist()
        assert not len(rows) or begins[:1] == [0], _ABSENT
        ends = [*begins[1:], len(rows)] if begins else []
        parts = []
        for chunk, begin, end in zip(self._chunks, begins, ends, strict=True):
            if begin < end:
                parts.append(Part(chunk.source, chunk.positions(ascending[begin:end]), order[begin:end]))
        return parts

    def _merge_heap(self, first_unmerged: int) -> None:
        """What came since the last time becomes one batch; then the last eight become one as long as the first of them
        is of no larger size than the others."""
        begin = len(self._chunks)
        while begin and self._chunks[begin - 1].on_heap:
            begin -= 1
        runs: list[_Run] = []
        for at in range(begin, len(self._chunks)):
            chunk = self._chunks[at]
            run = _Run(at, at + 1, len(chunk.rows), chunk.division)
            if chunk.rows[0] > first_unmerged and runs and runs[-1].may_take(run):
                runs[-1] = runs[-1].with_next(run)
            else:
                runs.append(run)
        merged: list[_Run] = []
        for run in runs:
            merged.append(run)
            while len(merged) >= MERGED_BATCHES:
                first, *others = merged[-MERGED_BATCHES:]
                num_rows = first.num_rows + sum(each.num_rows for each in others)
                is_larger = first.size > max(each.size for each in others)
                if is_larger or num_rows > MERGED_ROWS or first.division != run.division:
                    break
                merged[-MERGED_BATCHES:] = [_Run(first.begin, run.end, num_rows, run.division)]
        self._chunks[begin:] = [self._merged(run) for run in merged]
        self._starts = None
        self._first_unmerged = None

    def _merged(self, run: _Run) -> _Chunk:
        chunks = self._chunks[run.begin : run.end]
        if len(chunks) == 1:
            return chunks[0]
        return _Chunk.of(pa.concat_batches([chunk.batch for chunk in chunks]), True, run.division)


class _Run(NamedTuple):
    """Neighbouring batches [begin, end) that are one, or are to be."""

    begin: int
    end: int
    num_rows: int
    division: int

    def may_take(self, other: _Run) -> bool:
        """Whether both may be one batch."""
        return self.division == other.division and self.num_rows + other.num_rows <= MERGED_ROWS

    def with_next(self, other: _Run) -> _Run:
        """Both."""
        return self._replace(end=other.end, num_rows=self.num_rows + other.num_rows)

    @property
    def size(self) -> int:
        """As the exponent of a power of MERGED_BATCHES."""
        return int(math.log(self.num_rows, MERGED_BATCHES))
