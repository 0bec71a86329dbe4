"""Encoding batches into memory that is cut from large blocks.

The first touch of a page costs several times what it costs to copy into it, and large blocks come in large pages. A
block lives as long as anything that was cut from it.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

BLOCK_BYTES = 2**24
_MORE_BYTES = 512  # more than metadata take that are given with a batch, and the end of a stream


class BlockWriter:
    """Messages of batches in Arrow's IPC stream format, one after the other in blocks. Not thread-safe.

    Each block is one stream, since beginning one takes as long as encoding a batch of few rows.
    """

    def __init__(self, schema: pa.Schema, block_bytes: int = BLOCK_BYTES) -> None:
        """block_bytes: a message that is larger has a block of its own."""
        self._schema = schema
        self._header_bytes = schema.serialize().size
        self._block_bytes = block_bytes
        self._begin_block(0)

    def write(self, batch: pa.RecordBatch, metadata: dict[bytes, bytes]) -> memoryview:
        """The message of `batch`, in memory that is the caller's alone to change. metadata: of the message, up to 256
        bytes."""
        size_bytes = pa.ipc.get_record_batch_size(batch) + _MORE_BYTES
        begin = self._sink.tell() or self._header_bytes  # a stream writes its schema before the first batch
        if begin + size_bytes > len(self._block):
            self._begin_block(self._header_bytes + size_bytes)
            begin = self._header_bytes
        self._stream.write_batch(batch, custom_metadata=metadata)
        return self._block[begin : self._sink.tell()]

    def _begin_block(self, fewest_bytes: int) -> None:
        size_bytes = max(fewest_bytes, self._block_bytes)
        self._block: memoryview = np.empty(size_bytes, dtype=np.uint8).data  # numpy asks the system for large pages
        self._sink = pa.FixedSizeBufferWriter(pa.py_buffer(self._block))
        self._stream = pa.ipc.new_stream(self._sink, self._schema)
