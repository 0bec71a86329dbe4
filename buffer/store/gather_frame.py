"""The message of a gathered batch, all but the bytes of its lists and texts.

A batch of many columns takes longer to put together from arrays than its bytes take to copy. So the gathered batch is
written as one message of Arrow's IPC format and read as a whole, which makes a draw a tenth quicker. Batches of as
many rows differ in a few numbers of that message (how many items there are, where they begin), which are put in their
places; its beginning is then one more run of bytes among those that the cast of binary views copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from buffer.store.gather_source import NULL_MARK, VIEW_LANES, item_bytes

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
UInt8 = npt.NDArray[np.uint8]

_VIEWS = pa.binary_view()
_TO_CONTENT = pc.CastOptions.safe(pa.large_binary())
_MOST_ITEMS = 2**31 - 1
_ALIGNMENT_BYTES = 8  # of the buffers of a message
_PREFIX_BYTES = 8  # of a message: its start, and the length of its metadata


class GatherFrame:
    """For batches of `num_rows` rows, one at least. Not thread-safe."""

    def __init__(
        self,
        schema: pa.Schema,
        runs: Sequence[str],
        nullable: frozenset[str],
        numbers: Sequence[str],
        repeated: dict[str, pa.Array],
        num_rows: int,
    ) -> None:
        """runs: columns of lists and texts. nullable: those of them that have a null. numbers: columns as records hold
        them. repeated: what stands in every row of all other columns, [1] each."""
        self._schema = schema
        self._num_rows = num_rows
        columns = [
            _skeleton(field.type, num_rows, field.name in nullable)
            if field.name not in repeated
            else repeated[field.name].take(pa.array(np.zeros(num_rows, dtype=np.int64)))
            for field in schema
        ]
        message = bytearray(pa.RecordBatch.from_arrays(columns, schema=schema).serialize())
        self._message = _Message.of(message)
        self._start = pa.py_buffer(message)
        place = _places(schema)
        lists = [name for name in runs if not pa.types.is_string(schema.field(name).type)]
        self._is_list = np.array([name in lists for name in runs], dtype=np.bool_)
        self._item_nodes = np.array([place[name].node + 1 for name in lists], dtype=np.int64)
        # A text's own third buffer holds its bytes; after the two of a list come those of its items.
        self._contents = np.array([place[name].buffer + (3 if name in lists else 2) for name in runs], dtype=np.int64)
        self._ends = [self._message.buffer(place[name].buffer + 1).view(np.int32)[1 : num_rows + 1] for name in runs]
        self._validity = {
            index: (place[name].node, self._message.buffer(place[name].buffer)[: -(-num_rows // 8)])
            for index, name in enumerate(runs)
            if name in nullable
        }
        widths = [schema.field(name).type.bit_width // 32 for name in numbers]
        self._numbers = [
            self._message.buffer(place[name].buffer + 1).view(np.int32)[: num_rows * width].reshape(num_rows, width)
            for name, width in zip(numbers, widths, strict=True)
        ]
        self._shifts = np.array([item_bytes(schema.field(name).type).bit_length() - 1 for name in runs], dtype=np.int64)
        # First the start of the message, then per column its runs and what fills it up to a multiple of 8 bytes.
        views = np.zeros((1 + len(runs) * (num_rows + 1), VIEW_LANES), dtype=np.int32)
        views[0, 0] = len(message)
        self._start_view = views[0]
        self._views = views[1:].reshape(len(runs), num_rows + 1, VIEW_LANES)
        self._all_views = pa.py_buffer(views)
        self._num_views = len(views)

    def fill(self, records: Int32, places: Int64, windows: Sequence[pa.Buffer]) -> pa.RecordBatch:
        """The batch that has the rows with these records (see `buffer.store.gather_source`) at these places.

        records: [n, lanes], binary views into `windows` and numbers. places: [n] each of 0 to n - 1 once.

        Raises:
            ValueError: a column would hold more elements than Arrow can count in a batch.
        """
        num_rows, num_columns = self._num_rows, len(self._views)
        lane = VIEW_LANES * num_columns
        runs = self._views[:, :num_rows]
        runs[:, places] = records[:, :lane].reshape(num_rows, num_columns, VIEW_LANES).swapaxes(0, 1)
        for column in self._numbers:
            column[places] = records[:, lane : lane + column.shape[1]]
            lane += column.shape[1]
        ends = runs[:, :, 0].cumsum(axis=1, dtype=np.int64)  # in bytes
        sizes = ends[:, -1].copy()
        ends >>= self._shifts[:, None]
        num_items = ends[:, -1]
        if (most := int(num_items.max(initial=0))) > _MOST_ITEMS:
            raise ValueError(f"{num_rows} rows with {most} elements are too many for a batch: draw fewer at once")
        for column_ends, own in zip(self._ends, ends, strict=True):
            column_ends[:] = own
        for index, (node, validity) in self._validity.items():
            is_valid = (runs[index, :, 0] != 0) | (runs[index, :, 1] != NULL_MARK)
            validity[:] = np.packbits(is_valid, bitorder="little")
            self._message.nodes[node, 1] = num_rows - int(np.count_nonzero(is_valid))
        self._place_contents(sizes, num_items)
        self._start_view[2] = len(windows)
        buffers = [None, self._all_views, *windows, self._start]
        described = pa.Array.from_buffers(_VIEWS, self._num_views, buffers, null_count=0)
        _, _, message = pc.call_function("cast", [described], _TO_CONTENT).buffers()
        return pa.ipc.read_record_batch(message, self._schema)

    def _place_contents(self, sizes: Int64, num_items: Int64) -> None:
        """Note where the bytes of each column will be. sizes: [k] in bytes. num_items: [k]."""
        message = self._message
        filled = (sizes + (_ALIGNMENT_BYTES - 1)) & -_ALIGNMENT_BYTES
        ends = message.body_bytes + filled.cumsum()
        self._views[:, -1, 0] = filled - sizes
        message.buffers[self._contents, 0] = ends - filled
        message.buffers[self._contents, 1] = sizes
        message.nodes[self._item_nodes, 0] = num_items[self._is_list]
        message.body_length[:] = ends[-1:]


class _Place(NamedTuple):
    """Of the first node and the first buffer of a column in the tables of a message."""

    node: int
    buffer: int


class _Message(NamedTuple):
    """What a message says of its batch, to be written to: a flatbuffer ("Encapsulated message format" and "RecordBatch
    message" in Arrow's columnar format).

    nodes: [k, 2] length and null count of each array, parents first. buffers: [b, 2] where each begins in the body,
    and its size in bytes. body_length: [1]. body: [body_bytes].
    """

    nodes: Int64
    buffers: Int64
    body_length: Int64
    body: UInt8
    body_bytes: int

    @classmethod
    def of(cls, message: bytearray) -> _Message:
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


def _skeleton(type_: pa.DataType, num_rows: int, has_null: bool) -> pa.Array:
    """A column that has its buffers, whatever is in them."""
    if pa.types.is_list(type_) or pa.types.is_string(type_):
        empty = "" if pa.types.is_string(type_) else []
        return pa.array([None if has_null else empty, *[empty] * (num_rows - 1)], type_)
    return pa.Array.from_buffers(type_, num_rows, [None, pa.py_buffer(bytes(num_rows * type_.bit_width // 8))], 0)
