"""The bytes of an open segment on the heap, each at the place that it has in the file.

Batches are encoded here and written to the file from here. So what was found out about a row's place holds for the file
as well: when that is sealed, its mapping takes the place of the image, and nothing has to be looked at again.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

_MORE_BYTES = 512  # more than metadata take that are given with a batch
_GROWTH = 1.25  # so that the bytes of an image that is too small are copied seldom


class SegmentImage:
    """A schema and batches in Arrow's IPC stream format. Not thread-safe."""

    def __init__(self, schema: pa.Schema, room_bytes: int, content: bytes = b"") -> None:
        """room_bytes: reserved at once (memory is taken as it fills), more when that is used up. content: to go on
        after, from the schema to the end of a batch; empty = a new segment."""
        self._schema = schema
        self._header = schema.serialize().to_pybytes()
        content = content or self._header
        self._memory = _reserve(max(room_bytes, len(content)))
        self._memory[: len(content)] = content
        self._size_bytes = len(content)
        self._covered = b""
        self._stream = self._begin_stream()

    @property
    def size_bytes(self) -> int:
        """Of the schema and all batches."""
        return self._size_bytes

    @property
    def content(self) -> pa.Buffer:
        """All that is in the segment, as a view: what is there never changes, nor moves while anyone holds it."""
        return pa.py_buffer(self._memory[: self._size_bytes])

    def write(self, batch: pa.RecordBatch, metadata: dict[bytes, bytes]) -> memoryview:
        """Add a batch; gives its message, of which the caller may change the bytes. metadata: of the message, up to
        256 bytes."""
        begin = self._size_bytes
        end = begin + pa.ipc.get_record_batch_size(batch) + _MORE_BYTES
        if end > len(self._memory):
            memory = _reserve(max(end, int(_GROWTH * begin)))
            memory[:begin] = self._memory[:begin]
            self._memory = memory
            self._stream = self._begin_stream()
        writer, sink, stream_begin = self._stream
        writer.write_batch(batch, custom_metadata=metadata)
        if self._covered:
            self._memory[stream_begin:begin] = self._covered
            self._covered = b""
        self._size_bytes = stream_begin + sink.tell()
        return self._memory[begin : self._size_bytes]

    def cut(self, size_bytes: int) -> None:
        """Forget what was added since the image had this size."""
        assert len(self._header) <= size_bytes <= self._size_bytes, "where a batch ended"
        self._size_bytes = size_bytes
        self._stream = self._begin_stream()

    def _begin_stream(self) -> _Stream:
        """Have batches encoded after the last one. The schema, with which any stream begins, covers bytes before."""
        begin = self._size_bytes - len(self._header)
        self._covered = bytes(self._memory[begin : self._size_bytes])
        sink = pa.FixedSizeBufferWriter(pa.py_buffer(self._memory[begin:]))
        return _Stream(pa.ipc.new_stream(sink, self._schema), sink, begin)


class _Stream(NamedTuple):
    """What encodes batches. begin: where the sink begins in the memory."""

    writer: pa.ipc.RecordBatchStreamWriter
    sink: pa.FixedSizeBufferWriter
    begin: int


def _reserve(size_bytes: int) -> memoryview:
    return np.empty(size_bytes, dtype=np.uint8).data  # numpy asks the system for large pages
