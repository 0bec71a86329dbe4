"""The encoded message of a record batch whose lists and texts are yet to be filled in.

Arrow's IPC format has what a batch says of itself in front (a flatbuffer) and then the bytes of its columns. Where the
bytes of lists and texts are to be copied from many places, they need not be brought together in arrays first: the
message is encoded with empty lists and texts, the numbers that tell of their lengths are put in their places, and
whoever writes the message appends the bytes of each column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from buffer.store.gather_source import item_bytes

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
UInt8 = npt.NDArray[np.uint8]

_MOST_ITEMS = 2**31 - 1
_ALIGNMENT_BYTES = 8  # of the buffers of a message
_PREFIX_BYTES = 8  # of a message: its start, and the length of its metadata


class BatchMessage:
    """content: the message without the bytes of the runs (columns of lists and texts), which follow it in their order,
    each filled up to a multiple of 8 bytes. Everything here is a view of it, to be written to, also again and again."""

    def __init__(
        self, schema: pa.Schema, runs: Sequence[str], nullable: Set[str], others: Mapping[str, pa.Array], num_rows: int
    ) -> None:
        """nullable: those of the runs that have a null. others: all other columns, with the buffers that are to be
        written to. num_rows: one at least."""
        self.num_rows = num_rows
        columns = [
            _empty_runs(field.type, num_rows, field.name in nullable) if field.name in runs else others[field.name]
            for field in schema
        ]
        self.content = bytearray(pa.RecordBatch.from_arrays(columns, schema=schema).serialize())
        self._tables = _Tables.of(self.content)
        self._places = _places(schema)
        lists = [name for name in runs if not pa.types.is_string(schema.field(name).type)]
        self._is_list = np.array([name in lists for name in runs], dtype=np.bool_)
        first = [self._places[name] for name in runs]
        self._item_nodes = np.array([self._places[name].node + 1 for name in lists], dtype=np.int64)
        # A text's own third buffer holds its bytes; after the two of a list come those of its items.
        self._contents = np.array([place.buffer for place in first], dtype=np.int64) + 2 + self._is_list
        self.ends: list[Int32] = [self.buffer(name, 1).view(np.int32)[1 : num_rows + 1] for name in runs]
        """Per run column, [n] where each run ends, in items."""
        self.shifts = np.array([item_bytes(schema.field(name).type).bit_length() - 1 for name in runs], dtype=np.int64)
        """Per run column: its items have 2^k bytes."""

    def buffer(self, name: str, index: int) -> UInt8:
        """One of the buffers of a column, parents first: 0 the validity of its values, 1 the offsets of runs."""
        return self._tables.buffer(self._places[name].buffer + index)

    def put_validity(self, name: str, is_valid: Bool) -> None:
        """Say which values of a nullable column are there. is_valid: [n]."""
        self.buffer(name, 0)[: -(-self.num_rows // 8)] = np.packbits(is_valid, bitorder="little")
        self._tables.nodes[self._places[name].node, 1] = self.num_rows - int(np.count_nonzero(is_valid))

    def place_runs(self, sizes: Int64) -> Int64:
        """Say how many bytes each run column has; gives [k] how many are to be put after each.

        Raises:
            ValueError: a column would hold more elements than Arrow can count in a batch.
        """
        num_items = sizes >> self.shifts
        if (most := int(num_items.max(initial=0))) > _MOST_ITEMS:
            raise ValueError(f"{self.num_rows} rows with {most} elements are too many for a batch: draw fewer at once")
        tables = self._tables
        filled = (sizes + (_ALIGNMENT_BYTES - 1)) & -_ALIGNMENT_BYTES
        ends = tables.body_bytes + filled.cumsum()
        tables.buffers[self._contents, 0] = ends - filled
        tables.buffers[self._contents, 1] = sizes
        tables.nodes[self._item_nodes, 0] = num_items[self._is_list]
        tables.body_length[:] = ends[-1:]
        fill: Int64 = filled - sizes
        return fill


class _Place(NamedTuple):
    """Of the first node and the first buffer of a column in the tables of a message."""

    node: int
    buffer: int


class _Tables(NamedTuple):
    """What a message says of its batch, to be written to: parts of a flatbuffer ("Encapsulated message format" and
    "RecordBatch message" in Arrow's columnar format).

    nodes: [k, 2] length and null count of each array, parents first. buffers: [b, 2] where each begins in the body,
    and its size in bytes. body_length: [1]. body: [body_bytes].
    """

    nodes: Int64
    buffers: Int64
    body_length: Int64
    body: UInt8
    body_bytes: int

    @classmethod
    def of(cls, message: bytearray) -> _Tables:
        content = np.frombuffer(message, dtype=np.uint8)

        def int32(at: int) -> int:
            return int(content[at : at + 4].view(np.int32)[0])

        def field(table: int, index: int) -> int:
            """Where the value of a field stands."""
            entry = table - int32(table) + 4 + 2 * index
            offset = int(content[entry : entry + 2].view(np.uint16)[0])
            assert offset, "only fields that are always written are asked for"
            return table + offset

        def pairs(at: int) -> Int64:
            vector = at + int32(at)
            return np.frombuffer(message, np.int64, 2 * int32(vector), vector + 4).reshape(-1, 2)

        root = _PREFIX_BYTES + int32(_PREFIX_BYTES)
        header = field(root, 2)
        batch = header + int32(header)
        body = content[_PREFIX_BYTES + int32(4) :]
        body_length = np.frombuffer(message, np.int64, 1, field(root, 3))
        return cls(pairs(field(batch, 1)), pairs(field(batch, 2)), body_length, body, len(body))

    def buffer(self, index: int) -> UInt8:
        begin, size = self.buffers[index].tolist()
        return self.body[begin : begin + size]


def _places(schema: pa.Schema) -> dict[str, _Place]:
    """Of each column."""

    def width(type_: pa.DataType) -> _Place:
        inner = [width(type_.field(index).type) for index in range(type_.num_fields)]
        return _Place(1 + sum(each.node for each in inner), type_.num_buffers + sum(each.buffer for each in inner))

    places: dict[str, _Place] = {}
    node = buffer = 0
    for each in schema:
        places[each.name] = _Place(node, buffer)
        wide = width(each.type)
        node, buffer = node + wide.node, buffer + wide.buffer
    return places


def _empty_runs(type_: pa.DataType, num_rows: int, has_null: bool) -> pa.Array:
    """A column that has all its buffers."""
    offsets, validity = pa.py_buffer(bytes(4 * (num_rows + 1))), None
    if has_null:
        validity = pa.py_buffer(bytes(-(-num_rows // 8)))
    if pa.types.is_string(type_):
        return pa.Array.from_buffers(type_, num_rows, [validity, offsets, pa.py_buffer(b"")])
    items = pa.array([], type_.value_type)
    return pa.Array.from_buffers(type_, num_rows, [validity, offsets], children=[items])
