"""Gathering rows that lie scattered over many record batches into one batch.

Most of a trajectory's bytes stand in lists of numbers. Arrow's `take` moves such lists element by element; here
each list is copied as the run of bytes that it is. All other columns are narrow and left to Arrow: to `take`, or, where
only few rows come from each batch, to the concatenation of slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Bool = npt.NDArray[np.bool_]

SLICED_ROWS = 20
"""With fewer rows per batch, slicing them out one by one costs less than one `take`."""


@dataclass(frozen=True)
class _Lists:
    """A list column whose elements are never null. content: bytes of all elements; valid: [n], None = no null.

    Columns whose lists are of the same lengths share one array of offsets. all_null: every list is.
    """

    content: memoryview
    offsets: Int32
    valid: Bool | None
    all_null: bool


class GatherSource:
    """A record batch, with what a gather from it needs."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.batch = batch
        self._lists: dict[str, _Lists] | None = None
        self._narrow: tuple[tuple[str, ...], pa.RecordBatch] = ((), batch)
        self.schema = batch.schema
        self.names = tuple(batch.schema.names)

    @property
    def lists(self) -> dict[str, _Lists]:
        """The columns that can be copied as runs of bytes, by name."""
        if self._lists is None:
            self._lists = {}
            offsets: list[Int32] = []
            for field, column in zip(self.schema, self.batch.columns, strict=True):
                if (lists := _as_lists(field.type, column, offsets)) is not None:
                    self._lists[field.name] = lists
        return self._lists

    def select(self, names: tuple[str, ...]) -> pa.RecordBatch:
        """The batch with these columns only; asked for the same ones nearly always."""
        if self._narrow[0] != names:
            self._narrow = (names, self.batch.select(names))
        return self._narrow[1]


class Part(NamedTuple):
    """Rows that come from one batch. local: [k] their places there, ascending; at: [k] their places in the result."""

    source: GatherSource
    local: Int64
    at: Int64


def gather(parts: Sequence[Part], num_rows: int) -> pa.RecordBatch:
    """Copy of the rows of all parts, which fill the places 0 to `num_rows` - 1; at least one row, all of one schema."""
    schema, all_names = parts[0].source.schema, parts[0].source.names
    names = [name for name in parts[0].source.lists if all(name in part.source.lists for part in parts)]
    columns = _gather_lists(names, schema, parts, num_rows)
    rest = tuple(name for name in all_names if name not in columns)
    if rest:
        columns |= dict(zip(rest, _gather_narrow(rest, parts, num_rows).columns, strict=True))
    return pa.RecordBatch.from_arrays([columns[name] for name in all_names], schema=schema)


def _gather_narrow(names: tuple[str, ...], parts: Sequence[Part], num_rows: int) -> pa.RecordBatch:
    if num_rows < SLICED_ROWS * len(parts):
        slices = [None] * num_rows
        for part in parts:
            batch = part.source.select(names)
            for place, row in zip(part.at.tolist(), part.local.tolist(), strict=True):
                slices[place] = batch.slice(row, 1)
        return pa.concat_batches(slices)
    if len(parts) == 1:
        (part,) = parts
        return part.source.select(names).take(pa.array(part.local[np.argsort(part.at)]))
    taken = pa.concat_batches([part.source.select(names).take(pa.array(part.local)) for part in parts])
    places = np.concatenate([part.at for part in parts])
    return taken.take(pa.array(np.argsort(places)))


def _as_lists(type_: pa.DataType, column: pa.Array, known_offsets: list[Int32]) -> _Lists | None:
    """None where the column is none of lists that are runs of bytes. known_offsets: of the columns before."""
    if not pa.types.is_list(type_) or not pa.types.is_primitive(type_.value_type) or type_.value_type.bit_width % 8:
        return None
    elements = column.values
    if elements.null_count:
        return None
    offsets = column.offsets.to_numpy()
    for known in known_offsets:
        if np.array_equal(known, offsets):
            offsets = known
            break
    else:
        known_offsets.append(offsets)
    content = elements.buffers()[1]
    view = memoryview(content).cast("B") if content is not None else memoryview(b"")
    valid = column.is_valid().to_numpy(zero_copy_only=False) if column.null_count else None
    view = view[elements.offset * type_.value_type.bit_width // 8 :]
    return _Lists(view, offsets, valid, column.null_count == len(column))


class _Spans(NamedTuple):
    """Of the lists that a column of the result has. bounds: per list, index of its part, start and end in bytes there;
    null: [n].
    """

    bounds: list[tuple[int, int, int]]
    offsets: pa.Array
    null: pa.Array | None


def _gather_lists(
    names: Sequence[str], schema: pa.Schema, parts: Sequence[Part], num_rows: int
) -> dict[str, pa.ListArray]:
    columns: dict[str, pa.ListArray] = {}
    spans_of: dict[tuple[int, ...], _Spans] = {}
    for name in names:
        type_ = schema.field(name).type
        item_bytes = type_.value_type.bit_width // 8
        found = [part.source.lists[name] for part in parts]
        if all(lists.all_null for lists in found):
            columns[name] = pa.nulls(num_rows, type_)
            continue
        # Columns without nulls whose lists are of the same lengths everywhere have the same spans.
        key = (item_bytes, *(id(lists.offsets) for lists in found))
        spans = spans_of.get(key) if all(lists.valid is None for lists in found) else None
        if spans is None:
            spans = _spans(found, parts, num_rows, item_bytes)
            if spans.null is None:
                spans_of[key] = spans
        contents = [lists.content for lists in found]
        joined = b"".join([contents[index][start:end] for index, start, end in spans.bounds])
        elements = pa.Array.from_buffers(
            type_.value_type, len(joined) // item_bytes, [None, pa.py_buffer(joined)], null_count=0
        )
        columns[name] = pa.ListArray.from_arrays(spans.offsets, elements, type=type_, mask=spans.null)
    return columns


def _spans(found: Sequence[_Lists], parts: Sequence[Part], num_rows: int, item_bytes: int) -> _Spans:
    starts = np.empty(num_rows, dtype=np.int64)
    ends = np.empty(num_rows, dtype=np.int64)
    owners = np.empty(num_rows, dtype=np.int64)
    null: Bool | None = None
    for index, (lists, part) in enumerate(zip(found, parts, strict=True)):
        owners[part.at] = index
        starts[part.at] = lists.offsets[part.local]
        ends[part.at] = lists.offsets[part.local + 1]
        if lists.valid is not None:
            null = np.zeros(num_rows, dtype=np.bool_) if null is None else null
            null[part.at] = ~lists.valid[part.local]
    if null is not None:  # what stands under a null is no part of the rows
        ends[null] = starts[null]
    bounds = zip(owners.tolist(), (starts * item_bytes).tolist(), (ends * item_bytes).tolist(), strict=True)
    offsets = np.zeros(num_rows + 1, dtype=np.int64)
    np.cumsum(ends - starts, out=offsets[1:])
    return _Spans(list(bounds), pa.array(offsets, pa.int32()), None if null is None else pa.array(null))
