"""A record batch as a gather reads it: a record of a few numbers per row that says where the row's bytes lie.

Lists of numbers and texts are runs of bytes. A record describes each run as Arrow describes it in a *binary view*: 16
bytes with its length, buffer and place, or with the run itself where that is short. Numbers stand in the record as
they are, and columns that never vary take no place in it (see `buffer.store.gather_layout`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

if TYPE_CHECKING:
    from buffer.store.gather_layout import GatherLayout

Int32 = npt.NDArray[np.int32]
UInt8 = npt.NDArray[np.uint8]

Constant: TypeAlias = "bytes | tuple[Constant, ...]"
"""The bits of the value that a column repeats; a tuple: of the fields of a struct."""

NULLS: Constant = ()
"""Of a column that repeats null."""

VIEW_LANES = 4
"""Of 32 bits each, in a binary view: length, first bytes (for comparisons only, here 0), buffer, place."""

INLINE_BYTES = 12
"""A run up to this length stands in the view itself, in the three lanes after its length."""

NULL_MARK = 1
"""In the second lane of an empty run that is null."""

WINDOW_BITS = 30
"""A run is found by the window of 2^30 bytes that it begins in and its place there: places count in 32 bits."""


class Records(NamedTuple):
    """lanes: [n, lanes] binary views, whose buffers are `windows`, and numbers."""

    lanes: Int32
    windows: list[pa.Buffer]


class GatherSource:
    """A record batch of at least one row. What is found out about it costs one look at it, at the first gather."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.batch = batch
        self.covered_by: GatherLayout | None = None
        self._narrow: tuple[tuple[str, ...], pa.RecordBatch] = ((), batch)
        self._records: tuple[tuple[str, ...], Records] | None = None

    def constant(self, name: str) -> Constant | None:
        """What stands in every row of a column alike; None where values differ, or it is a column of numbers."""
        column = self.batch.column(name)
        if column.null_count == len(column):
            return NULLS
        return None if is_number(column.type) else _constant(column)

    def fits_records(self, name: str) -> bool:
        """Whether records can hold a column: numbers without nulls, text, and lists without nulls among the items."""
        column = self.batch.column(name)
        if is_number(column.type):
            return not column.null_count
        return pa.types.is_string(column.type) or (is_list_of_numbers(column.type) and not column.values.null_count)

    def records(self, runs: tuple[str, ...], numbers: tuple[str, ...]) -> Records:
        """Of these columns, which fit, runs first; kept, since a table asks for the same ones."""
        names = (*runs, *numbers)
        if self._records is None or self._records[0] != names:
            bits = [_bits(self.batch.column(name)).view(np.int32).reshape(self.batch.num_rows, -1) for name in numbers]
            lane = VIEW_LANES * len(runs)
            lanes = np.empty((self.batch.num_rows, lane + sum(each.shape[1] for each in bits)), dtype=np.int32)
            windows: list[pa.Buffer] = []
            for index, name in enumerate(runs):
                views = lanes[:, VIEW_LANES * index : VIEW_LANES * (index + 1)]
                windows += _describe(self.batch.column(name), views, len(windows))
            for each in bits:
                lanes[:, lane : lane + each.shape[1]] = each
                lane += each.shape[1]
            self._records = (names, Records(lanes, windows))
        return self._records[1]

    def select(self, names: tuple[str, ...]) -> pa.RecordBatch:
        """The batch with these columns only; asked for the same ones nearly always."""
        if self._narrow[0] != names:
            self._narrow = (names, self.batch.select(names))
        return self._narrow[1]


def is_number(type_: pa.DataType) -> bool:
    """Whether values are 32 or 64 bits: one or two lanes."""
    return bool(pa.types.is_primitive(type_) and type_.bit_width in (32, 64))


def is_list_of_numbers(type_: pa.DataType) -> bool:
    """Whether values are lists of items of whole bytes."""
    if not pa.types.is_list(type_) or not pa.types.is_primitive(type_.value_type):
        return False
    return bool(type_.value_type.bit_width % 8 == 0)


def item_bytes(type_: pa.DataType) -> int:
    """Of a column of lists or of text."""
    width: int = 1 if pa.types.is_string(type_) else type_.value_type.bit_width // 8
    return width


def run_bytes(column: pa.Array) -> tuple[Int32, UInt8]:
    """Offsets [n + 1], in items, and bytes of a column of lists without nulls among the items, or of text.

    Something may stand under a null.
    """
    if pa.types.is_string(column.type):
        offsets, buffer, skipped_bytes = _text_offsets(column), column.buffers()[2], 0
    else:
        offsets, buffer = column.offsets.to_numpy(), column.values.buffers()[1]
        skipped_bytes = column.values.offset * item_bytes(column.type)
    return offsets, np.frombuffer(buffer or b"", dtype=np.uint8)[skipped_bytes:]


def _describe(column: pa.Array, views: Int32, first_window: int) -> list[pa.Buffer]:
    """Fill [n, 4], the binary views of the values of a column; gives the windows that they refer to.

    Windows begin 2^30 bytes apart and are up to twice as long: one of them holds the whole of any shorter run.
    """
    offsets, content = run_bytes(column)
    ends = offsets.astype(np.int64) * item_bytes(column.type)
    begins, lengths = ends[:-1], np.diff(ends)
    if column.null_count:
        is_null = column.is_null().to_numpy(zero_copy_only=False)
        lengths[is_null] = 0  # what stands under a null is no part of the rows
    views[:, 0] = lengths
    views[:, 1] = 0
    views[:, 2] = first_window + (begins >> WINDOW_BITS)
    views[:, 3] = begins & ((1 << WINDOW_BITS) - 1)
    short = np.flatnonzero((lengths > 0) & (lengths <= INLINE_BYTES))
    if len(short):
        # What follows a run that is shorter still counts for nothing.
        places = np.minimum(begins[short, None] + np.arange(INLINE_BYTES), len(content) - 1)
        views[short, 1:] = content[places].view(np.int32)
    if column.null_count:
        views[is_null, 1] = NULL_MARK
    step = 1 << WINDOW_BITS
    return [pa.py_buffer(content[begin : begin + 2 * step - 1]) for begin in range(0, len(content) + 1, step)]


def _bits(column: pa.Array) -> npt.NDArray[np.generic]:
    """[n] the values of an array of fixed width, as unsigned numbers."""
    content = np.frombuffer(column.buffers()[1], dtype=f"u{column.type.bit_width // 8}")
    return content[column.offset : column.offset + len(column)]


def _text_offsets(column: pa.StringArray) -> Int32:
    offsets = np.frombuffer(column.buffers()[1], dtype=np.int32)
    return offsets[column.offset : column.offset + len(column) + 1]


def _constant(column: pa.Array) -> Constant | None:
    """The value of every row; None where they differ or some are null, or the type is none that trajectories have.

    Bits are compared, so that no value is taken for another (0.0 for -0.0).
    """
    found: Constant | None = None
    if column.null_count:
        return None
    if pa.types.is_string(column.type):
        found = _constant_text(column)
    elif pa.types.is_struct(column.type):
        fields = [each for field in column.flatten() if (each := _constant(field)) is not None]
        found = tuple(fields) if len(fields) == column.type.num_fields else None
    elif pa.types.is_boolean(column.type):
        found = bytes([column.true_count > 0]) if column.true_count in (0, len(column)) else None
    elif pa.types.is_primitive(column.type):
        bits = _bits(column)
        found = bits[:1].tobytes() if np.all(bits == bits[0]) else None
    return found


def _constant_text(column: pa.StringArray) -> bytes | None:
    offsets = _text_offsets(column)
    begin, width = int(offsets[0]), int(offsets[1] - offsets[0])
    if np.any(np.diff(offsets) != width):
        return None
    content = np.frombuffer(column.buffers()[2] or b"", dtype=np.uint8)
    text = content[begin : begin + width].tobytes()
    return text if content[begin : begin + width * len(column)].tobytes() == text * len(column) else None
