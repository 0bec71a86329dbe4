"""Durable segments: files in the Arrow IPC stream format, which any Arrow library reads.

    segment-000001.arrows        sealed: complete, listed in the manifest with its checksum, memory-mapped
    segment-000002.arrows.open   open, full: being sealed
    segment-000003.arrows.open   open: takes inserts; each batch carries a checksum of its own bytes

A batch is written with one `write` call after the last complete batch, so a crash leaves complete batches and
at most one torn one, which recovery cuts off. A sealed segment is an open one that was synced and got its other name,
or what a compaction wrote. Whether a mark stands at its end is all the same, to the format too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import xxhash

from buffer.store.growing_map import GrowingMap
from buffer.store.manifest import CorruptSegmentError, sync_folder
from buffer.store.message_encoder import MessageEncoder

OPEN_SUFFIX = ".arrows.open"
SEALED_SUFFIX = ".arrows"
_ANY_OPEN = f"segment-*{OPEN_SUFFIX}"
_MESSAGE_START = b"\xff\xff\xff\xff"
_PREFIX_BYTES = 8  # of a message: its start, and the length of its metadata
_MESSAGE_ALIGNMENT = 8

# The checksum stands in the metadata of the message that it covers: it is computed with zeros in its place.
_CHECKSUM_PREFIX = b"xxh3_128:"
_CHECKSUM_ZEROS = b"0" * 32
_NO_CHECKSUM = {b"checksum": _CHECKSUM_PREFIX + _CHECKSUM_ZEROS}
_CHECKSUM = re.compile(re.escape(_CHECKSUM_PREFIX) + rb"([0-9a-f]{32})")


def open_path(folder: Path, number: int) -> Path:
    """Where the open segment `number` lies."""
    return folder / f"segment-{number:06d}{OPEN_SUFFIX}"


def sealed_path(folder: Path, number: int) -> Path:
    """Where the sealed segment `number` lies."""
    return folder / f"segment-{number:06d}{SEALED_SUFFIX}"


def open_numbers(folder: Path, first: int) -> list[int]:
    """Numbers of the open segments, ascending, from `first` on. Rows come into the last one; those before are full and
    wait for their sealed copies."""
    names = (path.name.removeprefix("segment-").removesuffix(OPEN_SUFFIX) for path in folder.glob(_ANY_OPEN))
    return sorted(number for name in names if name.isdecimal() and (number := int(name)) >= first)


class OpenSegment:
    """A segment that takes inserts. Not thread-safe.

    sync_each_batch: whether `append` returns only when the batch would survive a loss of power; without, it
    survives the death of the process.
    """

    def __init__(self, path: Path, schema: pa.Schema, sync_each_batch: bool, room_bytes: int = 0) -> None:
        """Create `path`, or go on after its last byte (`cut_torn_tail` comes first). room_bytes: how large it is
        expected to grow, where `content` is asked for."""
        self.path = path
        self._header = schema.serialize().to_pybytes()
        self._sync_each_batch = sync_each_batch
        self._descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
        self._size_bytes = os.fstat(self._descriptor).st_size
        self._map = GrowingMap(self._descriptor, room_bytes)
        self._encoder = MessageEncoder(schema)
        if self._size_bytes == 0:
            self._write(self._header)
            sync_folder(path.parent)

    @property
    def size_bytes(self) -> int:
        """Bytes of complete batches and header."""
        return self._size_bytes

    def content(self) -> pa.Buffer:
        """Header and complete batches, mapped.

        Raises:
            OSError: the file cannot be mapped.
        """
        return self._map.content(self._size_bytes)

    @property
    def is_empty(self) -> bool:
        """Whether it holds no batch yet."""
        return self._size_bytes <= len(self._header)

    def append(self, batch: pa.RecordBatch) -> None:
        """Write a batch.

        Raises:
            OSError: the bytes could not be written; the file is as it was before.
        """
        message = self._encoder.encode(batch, _NO_CHECKSUM)
        renew_checksum(message)
        self._write(message)

    def append_message(self, message: bytearray) -> None:
        """Write a batch that is encoded already.

        Raises:
            OSError: see `append`.
        """
        self._write(message)

    def prepare_sync(self) -> Callable[[], None]:
        """A function that makes durable what is in the file now; it may run in another thread while batches come in
        and even after `close`."""
        descriptor = os.dup(self._descriptor)

        def sync() -> None:
            try:
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)

        return sync

    def close(self) -> None:
        """Make every batch durable and let go of the file."""
        os.fsync(self._descriptor)
        os.close(self._descriptor)

    def delete(self) -> None:
        """Let go of the file and delete it."""
        os.close(self._descriptor)
        self.path.unlink()

    def _write(self, content: bytes | bytearray | memoryview) -> None:
        view = memoryview(content)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
            if self._sync_each_batch:
                os.fdatasync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, self._size_bytes)
            error.filename = str(self.path)  # a descriptor says nothing to whoever has to make room
            raise
        self._size_bytes += len(content)


@dataclass(frozen=True)
class DamagedRange:
    """Bytes [start, end) of an open segment that hold no batch with the right checksum, though they once did.

    num_rows: how many rows the damaged batch says it has; None where even that cannot be read.
    """

    start: int
    end: int
    num_rows: int | None


@dataclass(frozen=True)
class OpenScan:
    """What an open segment holds. batches: complete ones, views of the bytes read; end: where the last of them or the
    last damaged range ends; size_bytes: of the file, which is larger where a write is under way or was torn."""

    batches: tuple[pa.RecordBatch, ...]
    damaged: tuple[DamagedRange, ...]
    end: int
    size_bytes: int

    @property
    def torn_bytes(self) -> int:
        """Bytes of an unfinished write at the end."""
        return self.size_bytes - self.end


def scan_open(path: Path, schema: pa.Schema) -> OpenScan:
    """Read an open segment as it is now, also while its writer goes on; changes nothing.

    Raises:
        FileNotFoundError: it was sealed meanwhile.
        CorruptSegmentError: its batches have other columns than `schema`.
    """
    content = path.read_bytes()
    buffer = pa.py_buffer(content)
    batches: list[pa.RecordBatch] = []
    damaged: list[DamagedRange] = []
    end = _header_end(content, schema)
    while end < len(content):
        message = _read_message(buffer, end)
        if message is None:
            start = next((at for at in _message_starts(content, end + 1) if _read_message(buffer, at)), None)
            if start is None:
                break
            damaged.append(DamagedRange(end, start, _claimed_rows(buffer, end, start, schema)))
            end = start
            continue
        try:
            batches.append(pa.ipc.read_record_batch(message.message, schema))
        except pa.ArrowException as error:
            raise CorruptSegmentError(
                f"{path} holds rows of another schema ({error}): move it away to go on without them"
            ) from None
        end = message.end
    if not _is_torn(buffer, end):
        damaged.append(DamagedRange(end, len(content), _claimed_rows(buffer, end, len(content), schema)))
        end = len(content)
    return OpenScan(tuple(batches), tuple(damaged), end, len(content))


def cut_torn_tail(path: Path, scan: OpenScan) -> int:
    """Cut an unfinished write off the file that `scan` is of, whose writer is dead; gives the bytes cut off."""
    if scan.torn_bytes:
        os.truncate(path, scan.end)
    return scan.torn_bytes


def read_batches(content: pa.Buffer, schema: pa.Schema, begin: int = 0) -> Iterator[tuple[pa.RecordBatch, int]]:
    """The batches of a segment that begin at a byte or later, as views of its content, each with where it ends."""
    source = pa.BufferReader(content)
    source.seek(begin)
    if not begin:
        pa.ipc.read_schema(source)
    while source.tell() < content.size:
        try:
            message = pa.ipc.read_message(source)
        except EOFError:  # how an earlier version of this program ended a sealed segment
            return
        yield pa.ipc.read_record_batch(message, schema), source.tell()


def encode_message(batch: pa.RecordBatch, schema: pa.Schema) -> bytearray:
    """The message of one batch as it stands in a stream, with its checksum."""
    message = bytearray(MessageEncoder(schema).encode(batch, _NO_CHECKSUM))
    renew_checksum(message)
    return message


def renew_checksum(message: bytearray | memoryview) -> None:
    """Make the checksum in a message that of its bytes, in place."""
    found = _CHECKSUM.search(message)
    assert found is not None, "each message is made with a place for it"
    begin, end = found.span(1)
    message[begin:end] = _CHECKSUM_ZEROS
    message[begin:end] = xxhash.xxh3_128(message).hexdigest().encode()


@dataclass(frozen=True)
class _Message:
    message: pa.Message
    end: int


def _read_message(buffer: pa.Buffer, start: int) -> _Message | None:
    """The message at byte `start`, None where there is no complete one with the right checksum."""
    source = pa.BufferReader(buffer.slice(start))
    try:
        message = pa.ipc.read_message(source)
    except (pa.ArrowException, EOFError, OSError):
        return None
    raw = bytearray(memoryview(buffer)[start : start + source.tell()])
    found = _CHECKSUM.search(raw, 0, len(raw) - message.body.size if message.body else len(raw))
    if found is None:
        return None
    checksum = bytes(found.group(1))
    raw[found.start(1) : found.end(1)] = _CHECKSUM_ZEROS
    if xxhash.xxh3_128(raw).hexdigest().encode() != checksum:
        return None
    return _Message(message, start + len(raw))


def _header_end(content: bytes, schema: pa.Schema) -> int:
    """Where the schema ends that a file begins with; 0 where it is torn or damaged, so that batches are searched."""
    source = pa.BufferReader(content)
    try:
        found = pa.ipc.read_schema(source)
    except (pa.ArrowException, EOFError, OSError):
        return 0
    end: int = source.tell()
    return end if found.equals(schema, check_metadata=True) else 0


def _is_torn(buffer: pa.Buffer, start: int) -> bool:
    """Whether the bytes from `start` to the end, which hold no complete batch, may be those of an unfinished write.

    The death of a process leaves a prefix of a message, a loss of power also blocks of zeros. Anything else was
    written in full and changed afterwards.
    """
    prefix = buffer[start : start + _PREFIX_BYTES].to_pybytes()
    if not any(prefix):
        return True
    if prefix[: len(_MESSAGE_START)] != _MESSAGE_START[: len(prefix)]:
        return False
    metadata_bytes = int.from_bytes(prefix[len(_MESSAGE_START) :], "little")
    if buffer.size - start < _PREFIX_BYTES + metadata_bytes:
        return True
    try:
        pa.ipc.read_message(pa.BufferReader(buffer.slice(start)))
    except (EOFError, OSError) as error:
        return "Expected to be able to read" in str(error)  # Arrow's words for a body that is not all there
    except pa.ArrowException:
        return False
    return False


def _claimed_rows(buffer: pa.Buffer, start: int, end: int, schema: pa.Schema) -> int | None:
    """Rows of the batch that fills [start, end) by its own account; None where nothing of that length is there."""
    source = pa.BufferReader(buffer.slice(start, end - start))
    try:
        message = pa.ipc.read_message(source)
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate()
    except (pa.ArrowException, EOFError, OSError):
        return None
    return batch.num_rows if source.tell() == end - start else None


def _message_starts(content: bytes, start: int) -> Iterator[int]:
    at = content.find(_MESSAGE_START, start)
    while at >= 0:
        if at % _MESSAGE_ALIGNMENT == 0:
            yield at
        at = content.find(_MESSAGE_START, at + 1)
