"""Random access to rows that lie in many record batches of many segments, in mapped files.

Nearly all bytes of a trajectory stand in lists of numbers, the rest mostly in text. Arrow's `take` moves lists element
by element, and joins batches first. Here a record of each row says where its bytes lie (see `gather_source`), in one
array over all segments, so that it does not matter how small batches are. A gather takes the records of its rows, and
one cast of the binary views in them copies run by run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from buffer.store import gather_source
from buffer.store.gather_layout import GatherLayout
from buffer.store.gather_source import VIEW_LANES
from buffer.store.record_slots import RecordSlots
from buffer.store.row_numbers import NO_ROWS
from buffer.store.segments import read_batches
from buffer.trajectory.schema import ROW, rows_of

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

_ABSENT = "a row that the table does not hold"
_NOTHING = pa.py_buffer(b"")


@dataclass
class _Segment:
    """read: gives schema and batches; num_rows: of those. windows: what `RowTable` knows each 2^30 bytes as. described:
    rows, and the bytes that hold them, whose records are made. rest: per batch, the columns that records cannot hold.
    """

    read: Callable[[], pa.Buffer]
    num_rows: int
    windows: list[int] = field(default_factory=list)
    described_rows: int = 0
    described_bytes: int = 0
    rest: list[pa.RecordBatch] = field(default_factory=list)


class _Unread(NamedTuple):
    """What a segment has that is not described. content: all of it. batches: the others, each with where it ends."""

    segment: _Segment
    content: pa.Buffer
    batches: list[tuple[pa.RecordBatch, int]]


class RowTable:
    """Segments of stored batches (`buffer.trajectory.schema.stored_schema`); rows are found by their column `row`.

    The numbers grow from segment to segment and within each, with gaps or without.
    """

    def __init__(self, schema: pa.Schema) -> None:
        """schema: of the stored batches."""
        self._schema = schema
        self._segments: dict[int, _Segment] = {}  # by number of the file, in the order of their rows
        self._slots = RecordSlots()
        self._is_described = False  # whether every row has its record
        self._windows: list[pa.Buffer] = []
        self._free_windows: list[int] = []
        self._layout: GatherLayout | None = None  # of the columns, from the first gather on
        self._rest: tuple[list[pa.RecordBatch], Int64] | None = None  # of all segments, and the first slot of each

    def append(self, number: int, read: Callable[[], pa.Buffer], rows: Int64) -> None:
        """Rows that come after all others are in segment `number` now. read: gives all of it; nothing in it has changed
        that was there before. rows: [n] their numbers; what else is in it was appended before."""
        segment = self._segments.get(number)
        if segment is None:
            segment = self._segments[number] = _Segment(read, 0)
        assert segment is next(reversed(self._segments.values())), "rows are appended in order"
        segment.read = read
        segment.num_rows += len(rows)
        self._slots.append(rows)
        self._is_described = False

    def move(self, number: int, content: pa.Buffer) -> None:
        """The bytes of a segment are to be read from here from now on."""
        segment = self._segments[number]
        segment.read = lambda: content
        self._map(segment, content)
        if self._layout is not None and segment.rest:
            batches = (batch.select(self._layout.rest) for batch, _ in read_batches(content, self._schema))
            segment.rest = list(itertools.islice(batches, len(segment.rest)))
            self._rest = None

    def content(self, number: int) -> pa.Buffer:
        """All of a segment."""
        return self._segments[number].read()

    def remove(self, numbers: Sequence[int]) -> None:
        """Forget neighbouring segments."""
        self._put(numbers, {}, NO_ROWS)

    def replace(self, old: Sequence[int], number: int, content: pa.Buffer) -> None:
        """Put segment `number`, which holds some of their rows, in the place of neighbours."""
        rows = np.concatenate([rows_of(batch) for batch, _ in read_batches(content, self._schema)])
        self._put(old, {number: _Segment(lambda: content, len(rows))}, rows)

    def _put(self, old: Sequence[int], new: dict[int, _Segment], rows: Int64) -> None:
        before = list(self._segments)
        at = before.index(old[0])
        assert before[at : at + len(old)] == list(old), "only neighbours are replaced"
        begin = sum(self._segments[each].num_rows for each in before[:at])
        end = begin + sum(self._segments[each].num_rows for each in old)
        assert np.isin(rows, self._slots.rows[begin:end]).all(), "rows stay in order"
        self._slots.replace(begin, end, rows)
        self._is_described, self._rest = False, None
        for each in old:
            self._forget(self._segments[each])
        kept = [{each: self._segments[each] for each in part} for part in (before[:at], before[at + len(old) :])]
        self._segments = {**kept[0], **new, **kept[1]}

    def holds(self, rows: Int64) -> bool:
        """Whether all rows with these numbers are in the table."""
        return bool((self._slots.find(rows) >= 0).all())

    def take(self, rows: Int64) -> pa.RecordBatch:
        """Copy of the rows with these numbers, in this order, without the column of the numbers; all of them are in the
        table, and there is one.

        Raises:
            ValueError: a column of lists would hold more elements than Arrow can count in a batch.
        """
        layout, slots = self._described(), self._find(rows)
        batch = layout.frame(len(rows)).fill(self._slots.records.take(slots, axis=0), self._windows)
        if not layout.rest:
            return batch
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        columns |= dict(zip(layout.rest, self._take_rest(slots).columns, strict=True))
        return pa.RecordBatch.from_arrays([columns[name] for name in layout.schema.names], schema=layout.schema)

    def ids(self, rows: Int64) -> pa.StringArray:
        """Ids of the rows with these numbers, in this order; all of them are in the table."""
        slots = self._find(rows)
        if not len(rows):
            return pa.array([], pa.string())
        layout = self._described()
        lane = VIEW_LANES * layout.runs.index("id")
        views = pa.py_buffer(np.ascontiguousarray(self._slots.records[slots, lane : lane + VIEW_LANES]))
        described = pa.Array.from_buffers(pa.string_view(), len(rows), [None, views, *self._windows], null_count=0)
        return described.cast(pa.string())

    def _find(self, rows: Int64) -> Int64:
        slots = self._slots.find(rows)
        assert not len(rows) or slots.min() >= 0, _ABSENT
        return slots

    def _described(self) -> GatherLayout:
        """The layout, once every row has its record."""
        if self._layout is not None and self._is_described:
            return self._layout
        new = [
            self._unread(segment) for segment in self._segments.values() if segment.described_rows < segment.num_rows
        ]
        batches = [batch for each in new for batch, _ in each.batches]
        if self._layout is None:
            schema = self._schema.remove(self._schema.get_field_index(ROW))
            self._layout = GatherLayout(schema, batches[0], varying={"id"})
            self._slots.widen(self._layout.num_lanes)
        if self._layout.cover(batches):
            self._slots.widen(self._layout.num_lanes)
            for segment in self._segments.values():
                segment.described_rows = segment.described_bytes = 0
                segment.rest = []
            return self._described()
        self._describe(self._layout, new)
        self._is_described = True
        return self._layout

    def _unread(self, segment: _Segment) -> _Unread:
        content = segment.read()
        return _Unread(segment, content, list(read_batches(content, self._schema, segment.described_bytes)))

    def _describe(self, layout: GatherLayout, new: Sequence[_Unread]) -> None:
        """Make the records of rows that have none."""
        self._rest = None
        first_slot, before = 0, iter(self._segments.values())
        for segment, content, batches in new:
            while (other := next(before)) is not segment:
                first_slot += other.num_rows
            self._map(segment, content)
            windows = np.array(segment.windows, dtype=np.int32)
            for batch, end in batches:
                slot = first_slot + segment.described_rows
                layout.describe(batch, self._slots.records[slot : slot + batch.num_rows], content, windows)
                segment.described_rows += batch.num_rows
                segment.described_bytes = end
                if layout.rest:
                    segment.rest.append(batch.select(layout.rest))
            first_slot += segment.num_rows

    def _map(self, segment: _Segment, content: pa.Buffer) -> None:
        """Have the windows of a segment show its content."""
        step = 1 << gather_source.WINDOW_BITS
        for index, begin in enumerate(range(0, content.size, step)):
            if index == len(segment.windows):
                segment.windows.append(self._free_windows.pop() if self._free_windows else len(self._windows))
                if segment.windows[-1] == len(self._windows):
                    self._windows.append(_NOTHING)
            self._windows[segment.windows[index]] = content[begin : begin + 2 * step - 1]

    def _forget(self, segment: _Segment) -> None:
        for window in segment.windows:
            self._windows[window] = _NOTHING
        self._free_windows += segment.windows

    def _take_rest(self, slots: Int64) -> pa.RecordBatch:
        """The columns that records do not hold."""
        if self._rest is None:
            batches = [batch for segment in self._segments.values() for batch in segment.rest]
            self._rest = batches, np.cumsum([0, *(batch.num_rows for batch in batches)])
        batches, starts = self._rest
        owners = np.searchsorted(starts, slots, side="right") - 1
        places = slots - starts[owners]
        slices = [batches[owner].slice(place, 1) for owner, place in zip(owners.tolist(), places.tolist(), strict=True)]
        return pa.concat_batches(slices)
