"""The segments of a shard: files in the Arrow IPC stream format, which any Arrow library reads.

    segment-000001.arrows    sealed: never changes, mapped into memory
    segment-000002.arrows    takes inserts: it has its full size from the beginning, and what is not written yet is
                             zeros, which mean the end of the stream to Arrow

Each message of rows has a checksum of its own bytes in its metadata. So a batch that is in the file, but not in the
catalog, is known as complete: a loss of power may leave that, since an insert syncs the segment alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from buffer.disk import sync_folder, sync_later
from buffer.store.catalog import segment_path

MOST_BYTES = 2**31 - 1
"""Of a segment: a view of a row (see `buffer.store.gather`) holds its place in 32 bits."""

_MESSAGE_START = b"\xff\xff\xff\xff"
_MESSAGE_ALIGNMENT = 8
_MORE_BYTES = 512  # more than the metadata take

# The checksum stands in the message that it covers: it is computed with zeros in its place.
_CHECKSUM_PREFIX = b"xxh3_128:"
_CHECKSUM_ZEROS = b"0" * 32
_METADATA = {b"checksum": _CHECKSUM_PREFIX + _CHECKSUM_ZEROS}
_CHECKSUM = re.compile(re.escape(_CHECKSUM_PREFIX) + rb"([0-9a-f]{32})")


class MessageEncoder:
    """Encodes batches of one schema in memory that is used again, since the first touch of a page costs several times
    what it costs to copy into it. Not thread-safe."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._header_bytes = schema.serialize().size
        self._memory: memoryview = memoryview(b"")

    def encode(self, batch: pa.RecordBatch) -> memoryview:
        """The message of `batch` with its checksum; good until the next call."""
        most_bytes = self._header_bytes + pa.ipc.get_record_batch_size(batch) + _MORE_BYTES
        if most_bytes > len(self._memory):
            self._memory = np.empty(most_bytes, dtype=np.uint8).data
        sink = pa.FixedSizeBufferWriter(pa.py_buffer(self._memory))
        pa.ipc.new_stream(sink, self._schema).write_batch(batch, custom_metadata=_METADATA)  # the schema comes first
        message = self._memory[self._header_bytes : sink.tell()]
        found = _CHECKSUM.search(message)
        assert found is not None, "the metadata that were given are in the message"
        message[slice(*found.span(1))] = xxhash.xxh3_128(message).hexdigest().encode()
        return message


def message_checksum(message: pa.Buffer | memoryview) -> bytes:
    """xxh3-128 of the bytes of a message as they are stored: what the catalog holds."""
    return xxhash.xxh3_128(message).digest()


@dataclass(frozen=True)
class FoundBatch:
    """A complete batch of a tail; it takes the bytes [offset, offset + length) of it."""

    batch: pa.RecordBatch
    offset: int
    length: int


def read_tail(path: Path, start: int) -> pa.Buffer:
    """A segment from byte `start` on: what is written there, and zeros.

    It is read, not mapped: a mapped hole takes a page of memory on a tmpfs, which a full one does not have (SIGBUS).
    """
    with path.open("rb") as file:
        file.seek(start)
        return pa.py_buffer(file.read())


def scan_tail(tail: pa.Buffer, schema: pa.Schema) -> Iterator[FoundBatch]:
    """The complete batches that a tail begins with, up to the first bytes that are none."""
    start = 0
    while (found := _read_message(tail, start, schema)) is not None:
        yield found
        start += found.length


def holds_message(tail: pa.Buffer, start: int, schema: pa.Schema) -> bool:
    """Whether a complete batch begins at byte `start` of a tail or anywhere behind it."""
    raw = memoryview(tail)[start:].tobytes().rstrip(b"\0")
    at = raw.find(_MESSAGE_START)
    while at >= 0:
        if (start + at) % _MESSAGE_ALIGNMENT == 0 and _read_message(tail, start + at, schema) is not None:
            return True
        at = raw.find(_MESSAGE_START, at + 1)
    return False


def written_bytes(tail: pa.Buffer, start: int) -> int:
    """How many bytes from `start` on are not the zeros of the end."""
    return len(memoryview(tail)[start:].tobytes().rstrip(b"\0"))


def _read_message(content: pa.Buffer, start: int, schema: pa.Schema) -> FoundBatch | None:
    source = pa.BufferReader(content.slice(start))
    try:
        message = pa.ipc.read_message(source)
    except (pa.ArrowException, EOFError, OSError):
        return None
    length = source.tell()
    raw = bytearray(memoryview(content)[start : start + length])
    found = _CHECKSUM.search(raw, 0, length - (message.body.size if message.body else 0))
    if found is None:
        return None
    checksum = bytes(found.group(1))  # before its place changes
    raw[slice(*found.span(1))] = _CHECKSUM_ZEROS
    if xxhash.xxh3_128(raw).hexdigest().encode() != checksum:
        return None
    return FoundBatch(pa.ipc.read_record_batch(message, schema), start, length)


class OpenSegment:
    """The segment that takes inserts. Not thread-safe."""

    def __init__(self, path: Path, end: int, sync_each_batch: bool) -> None:
        """Go on at byte `end`. sync_each_batch: whether `write` returns only when the bytes would survive a loss of
        power; without, they survive the death of the process."""
        self.path = path
        self.end = end
        self._sync_each_batch = sync_each_batch
        self._descriptor = os.open(path, os.O_RDWR)
        self.room = os.fstat(self._descriptor).st_size
        """Bytes of the file."""

    def grow(self, room: int) -> None:
        """Give the file so many bytes; the new ones are zeros."""
        os.ftruncate(self._descriptor, room)
        self.room = room

    def write(self, message: memoryview) -> None:
        """Put bytes at the end; they count when `end` is moved behind them.

        Raises:
            OSError: the disk refused.
        """
        at = self.end
        try:
            while message:
                written = os.pwrite(self._descriptor, message, at)
                message, at = message[written:], at + written
            if self._sync_each_batch:
                os.fdatasync(self._descriptor)
        except OSError as error:
            error.filename = str(self.path)  # a descriptor says nothing to whoever has to make room
            raise

    def prepare_sync(self) -> Callable[[], None]:
        """A function that makes every batch until now durable; it may run in any thread, also after `close`."""
        return sync_later(os.dup(self._descriptor))

    def close(self) -> None:
        """Make every batch durable and let go of the file."""
        os.fsync(self._descriptor)
        os.close(self._descriptor)


def create_segment(path: Path, header: pa.Buffer, room: int) -> None:
    """A new segment of `room` bytes, durable with its name."""
    with path.open("wb") as file:
        file.write(header)
        file.truncate(max(room, header.size))
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


class SegmentMaps:
    """The segments of a folder, mapped into memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.buffers: list[pa.Buffer] = []
        """What is mapped, by place; empty where nothing is. A segment keeps its place as long as it is mapped."""
        self._places: dict[int, int] = {}
        self._free: list[int] = []

    def map(self, number: int) -> pa.Buffer:
        """Map a segment as it is now; gives its content, which is empty where the file is missing."""
        if number not in self._places:
            self._places[number] = self._free.pop() if self._free else len(self.buffers)
        place = self._places[number]
        if place == len(self.buffers):
            self.buffers.append(pa.py_buffer(b""))
        path = segment_path(self._folder, number)
        has_bytes = path.exists() and path.stat().st_size > 0
        self.buffers[place] = pa.memory_map(str(path)).read_buffer() if has_bytes else pa.py_buffer(b"")
        return self.buffers[place]

    def unmap(self, number: int) -> None:
        """Let go of a segment; who still holds a part of it keeps the file mapped."""
        place = self._places.pop(number)
        self.buffers[place] = pa.py_buffer(b"")
        self._free.append(place)

    def place(self, number: int) -> int:
        """Of a mapped segment in `buffers`."""
        return self._places[number]

    def content(self, number: int) -> pa.Buffer:
        """Of a mapped segment."""
        return self.buffers[self._places[number]]
