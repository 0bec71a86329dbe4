"""A record batch as a gather reads it: a record of a few numbers per row that says where the row's bytes lie.

Lists of numbers and texts are runs of bytes. A record describes each run as Arrow describes it in a *binary view*: 16
bytes with its length, buffer and place, or with the run itself where that is short. Numbers stand in the record as
they are, and columns that never vary take no place in it (see `buffer.store.gather_layout`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

if TYPE_CHECKING:
    from buffer.store.gather_layout import GatherLayout

Int32 = npt.NDArray[np.int32]
Bool = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]

Constant: TypeAlias = "bytes | tuple[Constant, ...] | None"
"""The bits of the value that a column repeats; a tuple: of the fields of a struct; None: null."""

VIEW_LANES = 4
"""Of 32 bits each, in a binary view: length, first bytes (for comparisons only, here 0), buffer, place."""

INLINE_BYTES = 12
"""A run up to this length stands in the view itself, in the three lanes after its length."""

NULL_MARK = 1
"""In the second lane of an empty run that is null."""

WINDOW_BITS = 30
"""A run is found by the window of 2^30 bytes that it begins in and its place there: places count in 32 bits."""


@dataclass(frozen=True)
class Runs:
    """A column of lists of numbers, or of text: each value is a run of bytes.

    content: of all values. offsets: [n + 1] where they begin and end, in items of `item_bytes`. valid: [n], None = no
    null. first_window: among `GatherSource.windows`.
    """

    content: Bytes
    item_bytes: int
    offsets: Int32
    valid: Bool | None
    first_window: int

    @property
    def num_windows(self) -> int:
        """Windows that hold the content; at least one."""
        return (len(self.content) >> WINDOW_BITS) + 1

    def describe(self, views: Int32) -> None:
        """Fill [n, 4], the binary views of all rows."""
        offsets = self.offsets.astype(np.int64) * self.item_bytes
        begins, lengths = offsets[:-1], np.diff(offsets)
        if self.valid is not None:  # what stands under a null is no part of the rows
            lengths[~self.valid] = 0
        views[:, 0] = lengths
        views[:, 1] = 0
        views[:, 2] = self.first_window + (begins >> WINDOW_BITS)
        views[:, 3] = begins & ((1 << WINDOW_BITS) - 1)
        short = np.flatnonzero((lengths > 0) & (lengths <= INLINE_BYTES))
        if len(short):
            # What follows a run that is shorter still counts for nothing.
            places = np.minimum(begins[short, None] + np.arange(INLINE_BYTES), len(self.content) - 1)
            views[short, 1:] = self.content[places].view(np.int32)
        if self.valid is not None:
            views[~self.valid, 1] = NULL_MARK


class GatherSource:
    """A record batch of at least one row. What is found out about it costs one look at it, at the first gather."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.batch = batch
        self.names: tuple[str, ...] = tuple(batch.schema.names)
        self.covered_by: GatherLayout | None = None
        self._narrow: tuple[tuple[str, ...], pa.RecordBatch] = ((), batch)
        self._records: tuple[tuple[str, ...], Int32] | None = None

    @cached_property
    def runs(self) -> dict[str, Runs]:
        """Columns of lists and of text, by name, but for lists that hold nulls or no plain numbers."""
        found: dict[str, Runs] = {}
        first_window = 0
        for name, column in zip(self.names, self.batch.columns, strict=True):
            runs = _as_runs(column, first_window)
            if runs is not None:
                found[name] = runs
                first_window += runs.num_windows
        return found

    @cached_property
    def windows(self) -> list[pa.Buffer]:
        """The contents of all `runs`, cut so that a place in a window takes 32 bits.

        Windows begin 2^30 bytes apart and are up to twice as long: one of them holds the whole of any shorter run.
        """
        step = 1 << WINDOW_BITS
        return [
            pa.py_buffer(runs.content[index * step : (index + 2) * step - 1])
            for runs in self.runs.values()
            for index in range(runs.num_windows)
        ]

    @cached_property
    def constants(self) -> dict[str, Constant]:
        """What stands in every row alike, by name; of columns of numbers only nulls."""
        found: dict[str, Constant] = {}
        for name, column in zip(self.names, self.batch.columns, strict=True):
            if column.null_count == len(column):
                found[name] = None
            elif not pa.types.is_primitive(column.type) and (value := _constant(column)) is not None:
                found[name] = value
        return found

    @cached_property
    def numbers(self) -> dict[str, Int32]:
        """Columns of 32 or 64 bits without nulls, by name: [n, 1 or 2] views of their bits."""
        return {
            name: _bits(column).view(np.int32).reshape(len(column), -1)
            for name, column in zip(self.names, self.batch.columns, strict=True)
            if not column.null_count and pa.types.is_primitive(column.type) and column.type.bit_width in (32, 64)
        }

    def records(self, runs: tuple[str, ...], numbers: tuple[str, ...]) -> Int32:
        """[n, lanes] the views of these runs, then these numbers; kept, since a table asks for the same ones."""
        names = (*runs, *numbers)
        if self._records is None or self._records[0] != names:
            lanes = VIEW_LANES * len(runs) + sum(self.numbers[name].shape[1] for name in numbers)
            records = np.empty((self.batch.num_rows, lanes), dtype=np.int32)
            for index, name in enumerate(runs):
                self.runs[name].describe(records[:, VIEW_LANES * index : VIEW_LANES * (index + 1)])
            lane = VIEW_LANES * len(runs)
            for name in numbers:
                bits = self.numbers[name]
                records[:, lane : lane + bits.shape[1]] = bits
                lane += bits.shape[1]
            self._records = (names, records)
        return self._records[1]

    def select(self, names: tuple[str, ...]) -> pa.RecordBatch:
        """The batch with these columns only; asked for the same ones nearly always."""
        if self._narrow[0] != names:
            self._narrow = (names, self.batch.select(names))
        return self._narrow[1]


def _bits(column: pa.Array) -> npt.NDArray[np.generic]:
    """[n] the values of an array of fixed width, as unsigned numbers."""
    content = np.frombuffer(column.buffers()[1], dtype=f"u{column.type.bit_width // 8}")
    return content[column.offset : column.offset + len(column)]


def _as_runs(column: pa.Array, first_window: int) -> Runs | None:
    """None where the values are no runs of bytes."""
    if pa.types.is_string(column.type):
        item_bytes, content, offsets = 1, column.buffers()[2], _text_offsets(column)
    elif pa.types.is_list(column.type) and pa.types.is_primitive(column.type.value_type):
        elements = column.values
        item_bytes, unused_bits = divmod(elements.type.bit_width, 8)
        if unused_bits or elements.null_count:
            return None
        content, offsets = elements.buffers()[1], column.offsets.to_numpy()
        if content is not None:
            content = content.slice(elements.offset * item_bytes)
    else:
        return None
    valid = column.is_valid().to_numpy(zero_copy_only=False) if column.null_count else None
    return Runs(np.frombuffer(content or b"", dtype=np.uint8), item_bytes, offsets, valid, first_window)


def _text_offsets(column: pa.StringArray) -> Int32:
    offsets = np.frombuffer(column.buffers()[1], dtype=np.int32)
    return offsets[column.offset : column.offset + len(column) + 1]


def _constant(column: pa.Array) -> Constant:
    """The value of every row; None where they differ or some are null, or the type is none that trajectories have.

    Bits are compared, so that no value is taken for another (0.0 for -0.0).
    """
    found: Constant = None
    if column.null_count:
        return None
    if pa.types.is_string(column.type):
        found = _constant_text(column)
    elif pa.types.is_struct(column.type):
        fields = tuple(_constant(field) for field in column.flatten())
        found = None if None in fields else fields
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
    texts = content[begin : begin + width * len(column)].reshape(len(column), width)
    # Ids, which are all of one length, differ in their first and last row.
    is_constant = np.array_equal(texts[0], texts[-1]) and np.all(texts == texts[0])
    return texts[0].tobytes() if is_constant else None
