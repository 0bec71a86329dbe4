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
from buffer.store.gather_source import NULL_MARK, VIEW_LANES

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]

_VIEWS = pa.binary_view()
_TO_CONTENT = pc.CastOptions.safe(pa.large_binary())


class GatherFrame:
    """For batches of `num_rows` rows, one at least. Not thread-safe."""

    def __init__(
        self,
        schema: pa.Schema,
        runs: Sequence[str],
        nullable: Set[str],
        numbers: Sequence[str],
        repeated: Mapping[str, pa.Array],
        num_rows: int,
    ) -> None:
        """runs: columns of lists and texts. nullable: those of them that have a null. numbers: columns as records hold
        them. repeated: what stands in every row of all other columns, [1] each."""
        self._schema = schema
        widths = {name: schema.field(name).type.bit_width // 8 for name in numbers}
        zeros = {name: pa.py_buffer(bytes(num_rows * width)) for name, width in widths.items()}
        first = pa.array(np.zeros(num_rows, dtype=np.int64))
        others = {name: each.take(first) for name, each in repeated.items()}
        others |= {
            name: pa.Array.from_buffers(schema.field(name).type, num_rows, [None, zero], null_count=0)
            for name, zero in zeros.items()
        }
        self._message = BatchMessage(schema, runs, nullable, others, num_rows)
        self._start = pa.py_buffer(self._message.content)
        self._nullable = [index for index, name in enumerate(runs) if name in nullable]
        self._numbers = [
            self._message.values(name)[: num_rows * width // 4].reshape(num_rows, -1) for name, width in widths.items()
        ]
        # First the start of the message, then per column its runs and what is put after them.
        views = np.zeros((1 + len(runs) * (num_rows + 1), VIEW_LANES), dtype=np.int32)
        views[0, 0] = len(self._message.content)
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
        message, num_columns, num_rows = self._message, len(self._views), self._message.num_rows
        lane = VIEW_LANES * num_columns
        runs = self._views[:, :num_rows]
        runs[:, places] = records[:, :lane].reshape(num_rows, num_columns, VIEW_LANES).swapaxes(0, 1)
        for column in self._numbers:
            column[places] = records[:, lane : lane + column.shape[1]]
            lane += column.shape[1]
        ends = runs[:, :, 0].cumsum(axis=1, dtype=np.int64)  # in bytes
        self._views[:, -1, 0] = message.place_runs(ends[:, -1])
        ends >>= message.shifts[:, None]
        for of_column, own in zip(message.ends, ends, strict=True):
            of_column[:] = own
        for index in self._nullable:
            message.put_validity(index, (runs[index, :, 0] != 0) | (runs[index, :, 1] != NULL_MARK))
        self._start_view[2] = len(windows)
        buffers = [None, self._all_views, *windows, self._start]
        described = pa.Array.from_buffers(_VIEWS, self._num_views, buffers, null_count=0)
        _, _, content = pc.call_function("cast", [described], _TO_CONTENT).buffers()
        return pa.ipc.read_record_batch(content, self._schema)
