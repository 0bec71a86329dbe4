"""The log's record of a draw, quickly: most of its bytes are those of the draw before.

Every draw is noted before it is answered, and encoding a record of many columns, most of them null, takes longer than
all else about it. Records of draws of one stage and source, with as many rows, differ in numbers alone. So one is
encoded in the usual way, and for each draw the numbers are put in their places, which gives the same bytes.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from buffer.store.events import EVENT_SCHEMA, encode_events
from buffer.store.log_state import DrawKey, LoggedDraw
from buffer.store.row_numbers import Int64
from buffer.store.segments import encode_message, renew_checksum


class DrawRecord:
    """A message of the log with one draw. Not thread-safe."""

    def __init__(self, stage: str, source: str, num_rows: int) -> None:
        """Of draws of `num_rows` rows; one at least."""
        rows = np.zeros(num_rows, dtype=np.int64)
        draw = LoggedDraw(DrawKey(stage, 0, source), policy_version=0, rows=rows, whole=0)
        record = encode_events([draw.to_event()], at_us=0)
        self._message = encode_message(record, EVENT_SCHEMA, EVENT_SCHEMA.serialize().size)
        content = pa.py_buffer(self._message)
        stored = pa.ipc.read_record_batch(pa.ipc.read_message(content), EVENT_SCHEMA)

        def numbers(column: pa.Array) -> Int64:
            """Where they stand in the message, to be written to."""
            begin = column.buffers()[1].address - content.address
            assert 0 < begin < content.size, "the record is read without a copy"
            return np.frombuffer(self._message, dtype=np.int64, count=len(column), offset=begin)

        self._at_us = numbers(stored.column("at"))
        self._step = numbers(stored.column("step"))
        self._policy_version = numbers(stored.column("policy_version"))
        self._whole = numbers(stored.column("whole"))
        self._rows = numbers(stored.column("rows").values)

    def message(self, draw: LoggedDraw, at_us: int) -> bytearray:
        """The message of `draw`, which happened at `at_us` (microseconds since the epoch); good until the next one."""
        self._at_us[0] = at_us
        self._step[0] = draw.key.step
        self._policy_version[0] = draw.policy_version
        self._whole[0] = draw.whole
        self._rows[:] = draw.rows
        renew_checksum(self._message)
        return self._message
