"""Encoding batches as messages of Arrow's IPC stream format, in memory that is used again.

The first touch of a page costs several times what it costs to copy into it.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

_MORE_BYTES = 512  # more than metadata take that are given with a batch


class MessageEncoder:
    """Of batches of one schema. Not thread-safe."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._header_bytes = schema.serialize().size
        self._memory: memoryview = memoryview(b"")

    def encode(self, batch: pa.RecordBatch, metadata: dict[bytes, bytes]) -> memoryview:
        """The message of `batch`, to read and to write until the next call. metadata: of it, up to 256 bytes."""
        most_bytes = self._header_bytes + pa.ipc.get_record_batch_size(batch) + _MORE_BYTES
        if most_bytes > len(self._memory):
            self._memory = np.empty(most_bytes, dtype=np.uint8).data
        sink = pa.FixedSizeBufferWriter(pa.py_buffer(self._memory))
        pa.ipc.new_stream(sink, self._schema).write_batch(batch, custom_metadata=metadata)  # begins with the schema
        return self._memory[self._header_bytes : sink.tell()]
