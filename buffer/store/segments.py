"""The segments of a shard: files in the Arrow IPC stream format, which any Arrow library reads.

    segment-000001.arrows    sealed: never changes, mapped into memory
    segment-000002.arrows    takes inserts: it has its full size from the beginning; unwritten bytes are zeros, which
                             Arrow reads as the end of the stream

Each message of rows has a checksum of its own bytes in its metadata. It proves that a batch in the file is complete if
the catalog does not have it: a loss of power may cause that, since an insert syncs the segment alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from buffer.disk import sync_folder, sync_later, writing_to
from buffer.settings import BufferSettings
from buffer.store.catalog import BatchEntry, CatalogWriter, SegmentEntry, segment_path

MOST_BYTES = 2**31 - 1
"""Largest size of a segment: a view of a row (see `buffer.store.gather`) has 32 bits for its place."""

_MORE_BYTES = 512  # more than the metadata take

# The checksum stands in the message that it covers: it is computed with zeros in its place.
_CHECKSUM_PREFIX = b"xxh3_128:"
_CHECKSUM_ZEROS = b"0" * 32
_METADATA = {b"checksum": _CHECKSUM_PREFIX + _CHECKSUM_ZEROS}
_CHECKSUM = re.compile(re.escape(_CHECKSUM_PREFIX) + rb"([0-9a-f]{32})")


class MessageEncoder:
    """Encodes batches of one schema into reused memory, since the first write to a new page costs several times as much
    as a copy into it. Not thread-safe."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._header_bytes = schema.serialize().size
        self._memory: memoryview = memoryview(b"")

    def encode(self, batch: pa.RecordBatch) -> memoryview:
        """The message of `batch` with its checksum; valid until the next call."""
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


def read_message(content: pa.Buffer, start: int, schema: pa.Schema) -> tuple[pa.RecordBatch, int] | None:
    """The batch that begins at byte `start`, and where it ends; None where no complete batch begins there."""
    source = pa.BufferReader(content.slice(start))
    try:
        message = pa.ipc.read_message(source)
    except (pa.ArrowException, EOFError, OSError):
        return None
    end = start + source.tell()
    raw = bytearray(memoryview(content)[start:end])
    found = _CHECKSUM.search(raw, 0, len(raw) - (message.body.size if message.body else 0))
    if found is None:
        return None
    checksum = bytes(found.group(1))  # before its place changes
    raw[slice(*found.span(1))] = _CHECKSUM_ZEROS
    if xxhash.xxh3_128(raw).hexdigest().encode() != checksum:
        return None
    return pa.ipc.read_record_batch(message, schema), end


def message_checksum(message: pa.Buffer | memoryview) -> bytes:
    """xxh3-128 of the bytes of a message as they are stored: what the catalog holds."""
    return xxhash.xxh3_128(message).digest()


@dataclass
class Segment:
    """size: of a sealed file, None while it takes inserts; place: of its content in `Segments.buffers`; batches: by
    row, without `facts`."""

    number: int
    size: int | None
    place: int
    batches: list[BatchEntry] = field(default_factory=list)


class Segments:
    """The segments of an open shard, the place of each batch, and the file that takes inserts. Not thread-safe."""

    def __init__(self, folder: Path, schema: pa.Schema, settings: BufferSettings, catalog: CatalogWriter) -> None:
        """schema: of stored rows. Call `add`, `add_message` and `begin_inserts` before the first `write`."""
        self.folder = folder
        self.schema = schema
        self.header = schema.serialize()
        self.stored: dict[int, Segment] = {}
        self.buffers: list[pa.Buffer] = []
        """Mapped contents, by place; empty where nothing is mapped."""
        self.capacity_bytes = min(settings.segment_bytes, MOST_BYTES)
        """Size of a new file."""
        self._catalog = catalog
        self._syncs_each_batch = settings.fsync == "batch"
        self._encoder = MessageEncoder(schema)
        self._free_places: list[int] = []
        self._next_number = 1  # of a new file
        self._number = 0  # of the file that takes inserts
        self._path = folder
        self._descriptor = -1

    def add(self, entry: SegmentEntry) -> pa.Buffer:
        """Register a segment of the catalog; gives its content."""
        if not self._free_places:
            self._free_places.append(len(self.buffers))
            self.buffers.append(pa.py_buffer(b""))
        self.stored[entry.number] = Segment(entry.number, entry.size, self._free_places.pop())
        self._next_number = max(self._next_number, entry.number + 1)
        return self.map(entry.number)

    def map(self, number: int) -> pa.Buffer:
        """Map the current file of a segment; gives its content, empty where the file is missing."""
        path = segment_path(self.folder, number)
        has_bytes = path.exists() and path.stat().st_size > 0
        content = pa.memory_map(str(path)).read_buffer() if has_bytes else pa.py_buffer(b"")
        self.buffers[self.stored[number].place] = content
        return content

    def content(self, number: int) -> pa.Buffer:
        """Content of a segment."""
        return self.buffers[self.stored[number].place]

    def add_message(self, entry: BatchEntry) -> None:
        """Register a batch of the catalog."""
        self.stored[entry.segment].batches.append(entry._replace(facts=b""))

    def remove(self, number: int) -> None:
        """Delete a segment that the catalog no longer has; whoever still uses its content keeps the file mapped."""
        place = self.stored.pop(number).place
        self.buffers[place] = pa.py_buffer(b"")
        self._free_places.append(place)
        segment_path(self.folder, number).unlink(missing_ok=True)

    def take_number(self) -> int:
        """Reserve the number of a new file."""
        self._next_number += 1
        return self._next_number - 1

    def end_of(self, number: int) -> int:
        """Offset at which the committed bytes of a segment end."""
        segment = self.stored[number]
        if segment.size is not None:
            return segment.size
        header_bytes: int = self.header.size
        return max([header_bytes, *(each.offset + each.length for each in segment.batches[-1:])])

    @property
    def size_bytes(self) -> int:
        """Committed bytes of all segments."""
        return sum(map(self.end_of, self.stored))

    def begin_inserts(self) -> None:
        """Continue the segment that takes inserts, or create the first one."""
        unsealed = [each.number for each in self.stored.values() if each.size is None]
        if unsealed:
            self._open(*unsealed)
        else:
            self._begin(0)

    def write(self, batch: pa.RecordBatch) -> tuple[int, int, memoryview]:
        """Write a batch behind the committed bytes; without a commit of it, the next batch overwrites it. Gives
        segment, offset and message, which is valid until the next call. ValueError where the batch is too large for a
        file, OSError where the disk refused."""
        message = self._encoder.encode(batch)
        self._make_room(len(message))
        rest = message
        at = offset = self.end_of(self._number)
        with writing_to(self._path):
            while rest:
                written = os.pwrite(self._descriptor, rest, at)
                rest, at = rest[written:], at + written
            if self._syncs_each_batch:
                os.fdatasync(self._descriptor)
        return self._number, offset, message

    def prepare_sync(self) -> Callable[[], None]:
        """A function that makes every batch until now durable; it may run in any thread, also after `close`."""
        return sync_later(os.dup(self._descriptor))

    def close(self) -> None:
        """Make every batch durable, and truncate the segment that takes inserts to its committed bytes."""
        self._let_go(self._descriptor, self.end_of(self._number))

    def _make_room(self, num_bytes: int) -> None:
        capacity_bytes, begin = os.fstat(self._descriptor).st_size, self.end_of(self._number)
        if begin + num_bytes > capacity_bytes and begin > self.header.size:
            self._seal(num_bytes)
            capacity_bytes, begin = os.fstat(self._descriptor).st_size, self.header.size
        end = begin + num_bytes
        if end > MOST_BYTES:
            raise ValueError(f"a batch of {num_bytes:,} bytes is too large for a segment: insert fewer rows at once")
        if end > capacity_bytes:  # a batch larger than a segment
            os.ftruncate(self._descriptor, end)
            self.map(self._number)

    def _seal(self, num_bytes: int) -> None:
        number, descriptor, end = self._number, self._descriptor, self.end_of(self._number)
        if not self._syncs_each_batch:
            os.fdatasync(descriptor)
        self._begin(num_bytes, SegmentEntry(number, end))
        self.stored[number].size = end
        self._let_go(descriptor, end)
        self.map(number)

    def _begin(self, num_bytes: int, *sealed: SegmentEntry) -> None:
        """Create a segment for inserts, with capacity for at least `num_bytes`."""
        new = SegmentEntry(self.take_number(), None)
        path = segment_path(self.folder, new.number)
        try:
            create_segment(path, self.header, max(self.capacity_bytes, self.header.size + num_bytes))
            self._catalog.commit([*sealed, new])
        except OSError:
            path.unlink(missing_ok=True)
            raise
        self.add(new)
        self._open(new.number)

    def _open(self, number: int) -> None:
        self._number, self._path = number, segment_path(self.folder, number)
        self._descriptor = os.open(self._path, os.O_RDWR)

    @staticmethod
    def _let_go(descriptor: int, end: int) -> None:
        os.ftruncate(descriptor, end)
        os.fsync(descriptor)
        os.close(descriptor)


def create_segment(path: Path, header: pa.Buffer, capacity_bytes: int) -> None:
    """Create a segment of `capacity_bytes`; the file and its name are durable on return."""
    with path.open("wb") as file:
        file.write(header)
        file.truncate(max(capacity_bytes, header.size))
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)
