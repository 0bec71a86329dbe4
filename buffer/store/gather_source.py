"""What a gather knows of a stored row: a record of a few numbers that says where the row's bytes lie.

Lists of numbers and texts are runs of bytes. A record describes each run as Arrow describes it in a *binary view*: 16
bytes with its length, buffer and place, or with the run itself where that is short. Numbers and the validity of values
stand in the record as they are, and columns that never vary take no place in it (see `buffer.store.gather_layout`).

The batches that are described are those of files in the IPC format: whole ones, without an offset of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
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


class Leaf(NamedTuple):
    """One buffer of a column of fixed width. buffer: which of the column's; width: of a value in lanes, 0 = it is a
    bit, and has a lane all the same."""

    buffer: int
    width: int

    @property
    def lanes(self) -> int:
        """In a record."""
        return self.width or 1


def leaves(type_: pa.DataType, is_nullable: bool) -> tuple[Leaf, ...]:
    """What records hold of a column of fixed width (see `is_fixed`), parents first."""
    found = [Leaf(0, 0)] if is_nullable else []
    if not pa.types.is_struct(type_):
        return (*found, Leaf(1, type_.bit_width // 32))
    buffer = 1
    for index in range(type_.num_fields):
        inner = type_.field(index).type
        found += [Leaf(buffer + leaf.buffer, leaf.width) for leaf in leaves(inner, is_nullable=False)]
        buffer += inner.num_buffers if pa.types.is_struct(inner) else 2
    return tuple(found)


def is_fixed(type_: pa.DataType) -> bool:
    """Whether values are bits or numbers of 32 or 64 bits, or structs of such."""
    if pa.types.is_struct(type_):
        return all(is_fixed(type_.field(index).type) for index in range(type_.num_fields))
    return bool(pa.types.is_primitive(type_) and type_.bit_width in (1, 32, 64))


def is_list_of_numbers(type_: pa.DataType) -> bool:
    """Whether values are lists of items of whole bytes."""
    if not pa.types.is_list(type_) or not pa.types.is_primitive(type_.value_type):
        return False
    return bool(type_.value_type.bit_width % 8 == 0)


def item_bytes(type_: pa.DataType) -> int:
    """Of a column of lists or of text."""
    width: int = 1 if pa.types.is_string(type_) else type_.value_type.bit_width // 8
    return width


def fits_records(column: pa.Array) -> bool:
    """Whether records can hold a column: fixed widths, text, and lists without nulls among the items."""
    if is_fixed(column.type):
        if not pa.types.is_struct(column.type):
            return True
        present = column.drop_null() if column.null_count else column  # what stands under a null does not count
        return not any(field.null_count for field in present.flatten())
    return pa.types.is_string(column.type) or (is_list_of_numbers(column.type) and not column.values.null_count)


def describe_runs(columns: Sequence[pa.Array], views: Int32, content: pa.Buffer, windows: Int32) -> None:
    """Fill [n, k, 4], the binary views of the values of k columns of lists without nulls among the items, or of text.

    content: the bytes that all of them lie in. windows: of each 2^30 bytes of it, the index of the buffer that begins
    there, and is up to twice as long: one of them holds the whole of any shorter run.
    """
    num_rows, num_columns = views.shape[:2]
    offsets = np.empty((num_rows + 1, num_columns), dtype=np.int64)
    starts = np.zeros(num_columns, dtype=np.int64)
    nullable = []
    for index, column in enumerate(columns):
        validity, ends, *_, values = column.buffers()
        np.multiply(np.frombuffer(ends, np.int32, num_rows + 1), item_bytes(column.type), out=offsets[:, index])
        if values:  # what is empty lies anywhere
            starts[index] = values.address - content.address
        if validity is not None:
            nullable.append((index, ~_unpacked(validity, num_rows)))
    lengths = offsets[1:] - offsets[:-1]
    begins = offsets[:-1] + starts
    for index, is_null in nullable:
        lengths[is_null, index] = 0  # what stands under a null is no part of the rows
    views[..., 0] = lengths
    views[..., 1] = 0
    views[..., 2] = windows[begins >> WINDOW_BITS]
    views[..., 3] = begins & ((1 << WINDOW_BITS) - 1)
    is_short = (lengths > 0) & (lengths <= INLINE_BYTES)
    if is_short.any():
        # What follows a run that is shorter still counts for nothing.
        places = np.minimum(begins[is_short][:, None] + np.arange(INLINE_BYTES), content.size - 1)
        views[is_short, 1:] = np.frombuffer(content, np.uint8)[places].view(np.int32)
    for index, is_null in nullable:
        views[is_null, index, 1] = NULL_MARK


def describe_leaf(column: pa.Array, leaf: Leaf, lanes: Int32) -> None:
    """Fill [n, leaf.lanes] with what the leaf says of each value."""
    content = column.buffers()[leaf.buffer]
    if leaf.width:
        lanes[:] = np.frombuffer(content, np.int32, lanes.size).reshape(lanes.shape)
    else:  # a bitmap that is not there says yes to all
        lanes[:, 0] = 1 if content is None else _unpacked(content, len(lanes))


def constant(column: pa.Array) -> Constant | None:
    """What stands in every row of a column alike; None where values differ or some are null, or the type is none that
    trajectories have. Bits are compared, so that no value is taken for another (0.0 for -0.0)."""
    found: Constant | None = None
    if column.null_count:
        return NULLS if column.null_count == len(column) else None
    if pa.types.is_string(column.type):
        found = _constant_text(column)
    elif pa.types.is_struct(column.type):
        fields = [each for field in column.flatten() if (each := constant(field)) is not None]
        found = tuple(fields) if len(fields) == column.type.num_fields else None
    elif pa.types.is_boolean(column.type):
        found = bytes([column.true_count > 0]) if column.true_count in (0, len(column)) else None
    elif pa.types.is_primitive(column.type):
        bits = np.frombuffer(column.buffers()[1], f"u{column.type.bit_width // 8}", len(column))
        found = bits[:1].tobytes() if np.all(bits == bits[0]) else None
    return found


def _constant_text(column: pa.StringArray) -> bytes | None:
    _, ends, texts = column.buffers()
    offsets = np.frombuffer(ends, np.int32, len(column) + 1)
    begin, width = int(offsets[0]), int(offsets[1] - offsets[0])
    if np.any(np.diff(offsets) != width):
        return None
    content = (texts or pa.py_buffer(b"")).to_pybytes() if width else b""
    text = content[begin : begin + width]
    return text if content[begin : begin + width * len(column)] == text * len(column) else None


def _unpacked(bitmap: pa.Buffer, count: int) -> npt.NDArray[np.bool_]:
    return np.unpackbits(np.frombuffer(bitmap, np.uint8), count=count, bitorder="little").view(np.bool_)
