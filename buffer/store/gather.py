"""Copies rows out of mapped segments, from many batches at once.

Each text and each list of a row is a run of bytes. The table keeps a view of each run, in the layout of Arrow's type
`binary_view`: four 32-bit numbers, (length, -, segment, place). A run of 12 bytes or fewer is stored in the view, after
its length. So the runs of a sample are one array over the mapped segments, and Arrow's cast to binary copies them
into one buffer. Other columns have few distinct values: each combination of them (a context) is kept once, and a row
has the number of its context.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from buffer.store.sampling import Column
from buffer.store.segments import Segments
from buffer.store.table import RUNS, ReplayTable
from buffer.trajectory.schema import ROW, rows_of
from buffer.trajectory.staleness import Bool, Int32, Int64

CONTEXT = ("source", "task", "weights_fingerprint", "finish_reason", "sampling", "actor")
"""Columns of few distinct values."""

_DESCRIBED_TOGETHER = 512  # batches
_FEW = (*CONTEXT, "reward", ROW)
_ITEM_BYTES = 4  # of every list
_INLINE_BYTES = 12
_NULL_RUN = 1  # in the second number of the view of a run that is null, whose length is 0
_NULL_ITEM = -1  # under a null in `executed`; no token has this id
_EXECUTED = RUNS.index("executed")
_SHIFTS = np.array([[0 if name == "id" else 2] for name in RUNS])  # an item of the run has 2^k bytes
_MOST_ITEMS = 2**31 - 1
_LARGE_BINARY = pc.CastOptions.safe(pa.large_binary())
_FEWEST_CONTEXTS = 1024


def mark_null_items(batch: pa.RecordBatch) -> pa.RecordBatch:
    """With _NULL_ITEM as the value under each null in the lists of `executed`: a gather reads values alone."""
    column = batch.column("executed")
    if column.null_count == len(column) or not column.values.null_count:
        return batch
    column = pa.concat_arrays([column])  # without an offset
    values = column.values
    buffers = [_bits(values.is_valid().to_numpy(zero_copy_only=False)), values.fill_null(_NULL_ITEM).buffers()[1]]
    items = pa.Array.from_buffers(values.type, len(values), buffers)
    column = pa.Array.from_buffers(column.type, len(column), column.buffers()[:2], children=[items])
    return batch.set_column(batch.schema.get_field_index("executed"), batch.schema.field("executed"), column)


class Gather:
    """Rows of a table by their numbers. Not thread-safe."""

    def __init__(self, table: ReplayTable, segments: Segments) -> None:
        self._schema = segments.schema.remove(segments.schema.get_field_index(ROW))
        self._table = table
        self._segments = segments
        self._pending: dict[tuple[int, int], int] = {}  # length by segment and offset
        self._codes: dict[str, int] = {}  # of contexts
        self._contexts: pa.RecordBatch | None = None  # by their codes
        self._most_contexts = _FEWEST_CONTEXTS
        self._repeated: pa.RecordBatch | None = None
        self._has_values = np.zeros(len(RUNS), np.bool_)  # runs that are not null in all rows
        self._has_nulls = np.zeros(len(RUNS), np.bool_)
        self._has_reward = False

    def add(self, segment: int, offset: int, length: int) -> None:
        """A batch that is stored in these bytes; what is to be known of it is read when the next rows are taken."""
        self._pending[segment, offset] = length

    def forget(self, segment: int) -> None:
        """No row of this segment is taken any more."""
        self._pending = {place: length for place, length in self._pending.items() if place[0] != segment}

    def column(self, name: Column, rows: Int64) -> npt.NDArray[Any]:
        """[n] what a sampler may know of each row."""
        if name not in ("reward", "task"):
            column: npt.NDArray[Any] = getattr(self._table, name)
            return column[self._table.slots(rows)]
        self._describe()
        if name == "reward":
            return self._table.reward[self._table.slots(rows)]
        assert self._contexts is not None, "there are rows"
        codes: Int32 = self._contexts.column("task").dictionary_encode().indices.to_numpy()
        return codes[self._table.context[self._table.slots(rows)]]

    def take(self, rows: Int64) -> pa.RecordBatch:
        """Copies of these rows, at least one, in this order, without their numbers; ValueError: too many for one
        batch."""
        self._describe()
        table, count = self._table, len(rows)
        slots = table.slots(rows)
        runs = np.flatnonzero(self._has_values)
        views = np.ascontiguousarray(table.views.take(slots, axis=0).swapaxes(0, 1)[runs])
        ends = np.zeros((len(runs), count + 1), np.int64)
        np.cumsum(views[:, :, 0], axis=1, out=ends[:, 1:])
        sizes = ends[:, -1].tolist()
        ends >>= _SHIFTS[runs]
        if (most := int(ends[:, -1].max())) > _MOST_ITEMS:
            raise ValueError(f"{count} rows with {most} elements are too many for a batch: sample fewer at once")
        described = pa.Array.from_buffers(
            pa.binary_view(), len(runs) * count, [None, pa.py_buffer(views), *self._segments.buffers], null_count=0
        )
        content = pc.call_function("cast", [described], _LARGE_BINARY).buffers()[2]
        offsets = pa.py_buffer(ends.astype(np.int32))
        columns = self._few(slots)
        begin, width = 0, offsets.size // len(runs)
        for index, (run, size) in enumerate(zip(runs.tolist(), sizes, strict=True)):
            values = content.slice(begin, size)
            columns[RUNS[run]] = self._run(run, values, offsets.slice(index * width, width), views[index])
            begin += size
        absent = (field for field in self._schema if field.name not in columns)
        columns |= {field.name: pa.nulls(count, field.type) for field in absent}
        return pa.RecordBatch.from_arrays([columns[name] for name in self._schema.names], schema=self._schema)

    def _run(self, run: int, values: pa.Buffer, offsets: pa.Buffer, views: Int32) -> pa.Array:
        kind, validity, count = self._schema.field(RUNS[run]).type, None, len(views)
        if self._has_nulls[run]:
            validity = _bits((views[:, 0] != 0) | (views[:, 1] != _NULL_RUN))
        num_null = -1 if validity else 0
        if pa.types.is_string(kind):
            return pa.Array.from_buffers(kind, count, [validity, offsets, values], num_null)
        num_items = values.size // _ITEM_BYTES
        item_validity = None
        if run == _EXECUTED:
            item_validity = _bits(np.frombuffer(values, np.int32, num_items) != _NULL_ITEM)
        items = pa.Array.from_buffers(kind.value_type, num_items, [item_validity, values], -1 if item_validity else 0)
        return pa.Array.from_buffers(kind, count, [validity, offsets], num_null, children=[items])

    def _few(self, slots: Int64) -> dict[str, pa.Array]:
        """The other columns that are not null in all rows."""
        assert self._contexts is not None, "there are rows"
        table, contexts = self._table, self._repeated
        # The only one there is, for each row; it is kept, since most samples are as large as the one before.
        if contexts is None or contexts.num_rows != len(slots) or self._contexts.num_rows > 1:
            contexts = self._repeated = self._contexts.take(pa.array(table.context[slots]))
        found = dict(zip(CONTEXT, contexts.columns, strict=True))
        created = pa.py_buffer(table.created_us[slots])
        created_type = self._schema.field("created_at").type
        found["created_at"] = pa.Array.from_buffers(created_type, len(slots), [None, created], null_count=0)
        if self._has_reward:
            found["reward"] = pa.array(table.reward[slots], pa.float32(), from_pandas=True)
        return found

    # What is known of a row

    def _describe(self) -> None:
        """Read what is to be known of the batches that came since."""
        pending, self._pending = list(self._pending.items()), {}
        for first in range(0, len(pending), _DESCRIBED_TOGETHER):
            if len(self._codes) > self._most_contexts:
                self._forget_contexts()
            few = []
            for (segment, offset), length in pending[first : first + _DESCRIBED_TOGETHER]:
                content = self._segments.content(segment)
                batch = pa.ipc.read_record_batch(content.slice(offset, length), self._segments.schema)
                views = self._views(batch, content, offset + length, self._segments.stored[segment].place)
                self._table.views[self._table.slots(rows_of(batch))] = views
                few.append(batch.select(_FEW))
            joined = pa.concat_batches(few)
            slots = self._table.slots(rows_of(joined))
            self._table.context[slots] = self._context_codes(joined)
            reward = joined.column("reward")
            self._has_reward |= reward.null_count < len(reward)
            self._table.reward[slots] = reward.fill_null(float("nan")).to_numpy() if self._has_reward else np.nan

    def _views(self, batch: pa.RecordBatch, content: pa.Buffer, end: int, place: int) -> Int32:
        """[n, runs, 4] of a batch that ends at byte `end` of `content`, the segment mapped at `place`."""
        count = batch.num_rows
        ends = np.zeros((len(RUNS), count + 1), np.int64)
        begins = np.zeros((len(RUNS), 1), np.int64)
        views = np.zeros((len(RUNS), count, 4), np.int32)
        nulls: list[tuple[int, Bool]] = []
        for run, name in enumerate(RUNS):
            column = batch.column(name)
            if column.null_count:
                self._has_nulls[run] = True
                nulls.append((run, column.is_null().to_numpy(zero_copy_only=False)))
                if column.null_count == count:
                    continue
            self._has_values[run] = True
            buffers = column.buffers()
            np.left_shift(np.frombuffer(buffers[1], np.int32, count + 1), _SHIFTS[run], out=ends[run], dtype=np.int64)
            begins[run] = buffers[-1].address - content.address if buffers[-1] else 0
        lengths = ends[:, 1:] - ends[:, :-1]
        begins = begins + ends[:, :-1]
        for run, is_null in nulls:
            lengths[run, is_null], views[run, is_null, 1] = 0, _NULL_RUN
        views[:, :, 0], views[:, :, 2], views[:, :, 3] = lengths, place, begins
        is_short = (lengths > 0) & (lengths <= _INLINE_BYTES)
        if is_short.any():
            at = np.minimum(begins[is_short][:, None] + np.arange(_INLINE_BYTES), end - 1)
            views[is_short, 1:] = np.frombuffer(content, np.uint8)[at].view(np.int32)
        return views.swapaxes(0, 1)

    def _context_codes(self, batch: pa.RecordBatch) -> Int64:
        """[n] number of the context of each row; new ones are kept."""
        distinct, inverse = _distinct(batch.select(CONTEXT))
        codes, new = [], []
        for place, values in enumerate(distinct.to_pylist()):
            key = repr(values)
            if key not in self._codes:
                self._codes[key] = len(self._codes)
                new.append(place)
            codes.append(self._codes[key])
        if new:
            more = distinct.take(pa.array(new))
            self._contexts = more if self._contexts is None else pa.concat_batches([self._contexts, more])
        return np.array(codes)[inverse]

    def _forget_contexts(self) -> None:
        """Keep those that a stored row has."""
        assert self._contexts is not None, "there are more than a few"
        table = self._table
        stored = np.flatnonzero(table.is_stored)
        used, table.context[stored] = np.unique(table.context[stored], return_inverse=True)
        self._contexts, self._repeated = self._contexts.take(pa.array(used)), None
        keys = list(self._codes)
        self._codes = {keys[code]: place for place, code in enumerate(used.tolist())}
        self._most_contexts = 2 * len(used) + _FEWEST_CONTEXTS


def _distinct(batch: pa.RecordBatch) -> tuple[pa.RecordBatch, Int64]:
    """The distinct rows of a batch, and [n] which of them each row is."""
    codes = np.zeros(batch.num_rows, np.int64)
    for column in batch.columns:
        for leaf in column.flatten() if pa.types.is_struct(column.type) else [column]:
            # As bits: 0.0 equals -0.0, yet is another value.
            values = leaf.view(pa.int32()) if pa.types.is_float32(leaf.type) else leaf
            encoded = values.dictionary_encode("encode")
            if (size := len(encoded.dictionary)) > 1:
                _, codes = np.unique(codes * size + encoded.indices.to_numpy(), return_inverse=True)
    if not codes.any():
        return batch.slice(0, 1), codes
    _, firsts, inverse = np.unique(codes, return_index=True, return_inverse=True)
    return batch.take(pa.array(firsts)), inverse


def _bits(mask: Bool) -> pa.Buffer:
    return pa.py_buffer(np.packbits(mask, bitorder="little"))
