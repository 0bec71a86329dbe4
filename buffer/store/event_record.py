"""A record of the log, quickly: most of its bytes are those of the one before.

Every draw is noted before it is answered, and encoding a record of many columns, most of them null, takes longer than
all else about it. Records of events of one kind, stage and source, with as many rows, differ in numbers alone. So one
is encoded in the usual way, and for each event the numbers are put in their places, which gives the same bytes.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from buffer.store.events import EVENT_SCHEMA, Event, encode_events
from buffer.store.row_numbers import NO_ROWS, Int64
from buffer.store.segments import encode_message, renew_checksum


class EventRecord:
    """A message of the log with one event. Not thread-safe."""

    def __init__(self, event: Event) -> None:
        """event: one like those to come, without ids, times or priorities."""
        record = encode_events([event], at_us=0)
        self._message = encode_message(record, EVENT_SCHEMA)
        content = pa.py_buffer(self._message)
        stored = pa.ipc.read_record_batch(pa.ipc.read_message(content), EVENT_SCHEMA)

        def numbers(column: pa.Array) -> Int64:
            """Where they stand in the message, to be written to."""
            begin = column.buffers()[1].address - content.address
            assert 0 < begin < content.size, "the record is read without a copy"
            return np.frombuffer(self._message, dtype=np.int64, count=len(column), offset=begin)

        self._at_us = numbers(stored.column("at"))
        present = [name for name in ("step", "policy_version", "whole") if getattr(event, name) is not None]
        self._numbers = [(name, numbers(stored.column(name))) for name in present]
        self._rows = NO_ROWS if event.rows is None else numbers(stored.column("rows").values)

    def message(self, event: Event, at_us: int) -> bytearray:
        """The message of `event`, which happened at `at_us` (microseconds since the epoch); good until the next one."""
        self._at_us[0] = at_us
        for name, place in self._numbers:
            place[0] = getattr(event, name)
        self._rows[:] = NO_ROWS if event.rows is None else event.rows
        renew_checksum(self._message)
        return self._message
