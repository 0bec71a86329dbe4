"""What batches that are gathered from one table have in common, where they have as many rows.

A batch of many columns takes longer to put together from arrays than its bytes take to copy. So the gathered batch is
written as one message of Arrow's IPC format and read as a whole, which makes a draw a tenth quicker: the beginning of
the message is one more run of bytes among those that the cast of binary views copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from buffer.store.batch_message import BatchMessage
from buffer.store.gather_source import NULL_MARK, VIEW_LANES, Leaf, leaves

Int32 = npt.NDArray[np.int32]
UInt8 = npt.NDArray[np.uint8]

_VIEWS = pa.binary_view()
_TO_CONTENT = pc.CastOptions.safe(pa.large_binary())


class GatherFrame:
    """For batches of `num_rows` rows, one at least. Not thread-safe."""

    def __init__(
        self,
        schema: pa.Schema,
        runs: Sequence[str],
        fixed: Sequence[str],
        nullable: Set[str],
        repeated: Mapping[str, pa.Array],
        num_rows: int,
    ) -> None:
        """runs: columns of lists and texts. fixed: columns of fixed width. nullable: those of both that have a null.
        repeated: what stands in every row of all other columns, [1] each."""
        self._schema = schema
        first = pa.array(np.zeros(num_rows, dtype=np.int64))
        others = {name: each.take(first) for name, each in repeated.items()}
        others |= {name: _empty(schema.field(name).type, name in nullable, num_rows) for name in fixed}
        self._message = message = BatchMessage(schema, runs, nullable, others, num_rows)
        self._start = pa.py_buffer(message.content)
        self._nullable = [(index, name) for index, name in enumerate(runs) if name in nullable]
        self._numbers: list[Int32] = []
        self._number_lanes: list[slice] = []
        self._bits: list[tuple[int, str, UInt8 | None]] = []  # lane, column, and where they go; None = its validity
        lane = VIEW_LANES * len(runs)
        for name in fixed:
            for leaf in leaves(schema.field(name).type, name in nullable):
                self._place_leaf(name, leaf, lane, num_rows)
                lane += leaf.lanes
        # First the start of the message, then per column its runs and what is put after them.
        views = np.zeros((1 + len(runs) * (num_rows + 1), VIEW_LANES), dtype=np.int32)
        views[0, 0] = len(message.content)
        self._start_view = views[0]
        self._views = views[1:].reshape(len(runs), num_rows + 1, VIEW_LANES)
        self._all_views = pa.py_buffer(views)
        self._num_views = len(views)

    def fill(self, records: Int32, windows: Sequence[pa.Buffer]) -> pa.RecordBatch:
        """The batch that has the rows with these records (see `buffer.store.gather_source`).

        records: [n, lanes], binary views into `windows` and what is of fixed width.

        Raises:
            ValueError: a column would hold more elements than Arrow can count in a batch.
        """
        message, num_columns, num_rows = self._message, len(self._views), self._message.num_rows
        runs = self._views[:, :num_rows]
        runs[:] = records[:, : VIEW_LANES * num_columns].reshape(num_rows, num_columns, VIEW_LANES).swapaxes(0, 1)
        for values, lanes in zip(self._numbers, self._number_lanes, strict=True):
            values[:] = records[:, lanes]
        for lane, name, bitmap in self._bits:
            bits = records[:, lane].astype(np.bool_)
            if bitmap is None:
                message.put_validity(name, bits)
            else:
                bitmap[:] = np.packbits(bits, bitorder="little")
        ends = runs[:, :, 0].cumsum(axis=1, dtype=np.int64)  # in bytes
        self._views[:, -1, 0] = message.place_runs(ends[:, -1])
        ends >>= message.shifts[:, None]
        for of_column, own in zip(message.ends, ends, strict=True):
            of_column[:] = own
        for index, name in self._nullable:
            message.put_validity(name, (runs[index, :, 0] != 0) | (runs[index, :, 1] != NULL_MARK))
        self._start_view[2] = len(windows)
        buffers = [None, self._all_views, *windows, self._start]
        described = pa.Array.from_buffers(_VIEWS, self._num_views, buffers, null_count=0)
        _, _, content = pc.call_function("cast", [described], _TO_CONTENT).buffers()
        return pa.ipc.read_record_batch(content, self._schema)

    def _place_leaf(self, name: str, leaf: Leaf, lane: int, num_rows: int) -> None:
        buffer = self._message.buffer(name, leaf.buffer)
        if leaf.width:
            self._numbers.append(buffer[: 4 * leaf.width * num_rows].view(np.int32).reshape(num_rows, leaf.width))
            self._number_lanes.append(slice(lane, lane + leaf.width))
        else:
            self._bits.append((lane, name, buffer[: -(-num_rows // 8)] if leaf.buffer else None))


def _empty(type_: pa.DataType, is_nullable: bool, num_rows: int) -> pa.Array:
    """[n] of fixed width, with all its buffers."""
    validity = pa.py_buffer(bytes(-(-num_rows // 8))) if is_nullable else None
    if pa.types.is_struct(type_):
        inner = [_empty(type_.field(index).type, False, num_rows) for index in range(type_.num_fields)]
        return pa.Array.from_buffers(type_, num_rows, [validity], children=inner)
    values = pa.py_buffer(bytes(-(-type_.bit_width * num_rows // 8)))
    return pa.Array.from_buffers(type_, num_rows, [validity, values])
