"""Sealed segments: how an open one becomes one, how a compaction writes one, and how one is mapped and verified."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import xxhash

from buffer.store.manifest import CorruptSegmentError, SegmentEntry, sync_folder
from buffer.store.segments import read_batches, sealed_path

_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)
"""Of file systems that know no second names."""


@dataclass(frozen=True)
class SealedFile:
    """What the manifest says of a file."""

    size_bytes: int
    checksum: str


def seal_open(source: Path, path: Path) -> SealedFile:
    """Make a full open segment durable and give it a second name, that of a sealed one, so that it has one that counts
    at any moment; the caller deletes the first when the second does.

    Raises:
        OSError: the disk refused; the open segment stays as it is.
    """
    _sync_file(source)
    path.unlink(missing_ok=True)  # of an attempt that failed
    try:
        os.link(source, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        temporary = path.with_name(path.name + ".tmp")
        shutil.copyfile(source, temporary)
        _sync_file(temporary)
        temporary.rename(path)
    sync_folder(path.parent)
    return _measure(path)


def write_sealed(path: Path, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> SealedFile:
    """Write a complete segment next to `path`, make it durable and rename it into place.

    Raises:
        OSError: the disk refused; nothing is left behind.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        _sync_file(temporary)
        sealed = _measure(temporary)
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return sealed


def map_sealed(folder: Path, entry: SegmentEntry, schema: pa.Schema) -> list[pa.RecordBatch]:
    """Map a sealed segment; its batches are views of the file (see `map_content`).

    Raises:
        CorruptSegmentError: see `map_content`.
    """
    return [batch for batch, _ in read_batches(map_content(folder, entry, schema), schema)]


def map_content(folder: Path, entry: SegmentEntry, schema: pa.Schema) -> pa.Buffer:
    """Map a sealed segment, which stays readable here after its deletion; gives all that is in it.

    Raises:
        CorruptSegmentError: the file is missing, or differs from what the manifest says.
    """
    path = sealed_path(folder, entry.number)
    remedy = (
        f"restore it from a copy, or delete its entry from {folder / 'manifest.json'} to go on without its "
        f"{entry.num_rows} trajectories"
    )
    if not path.exists():
        raise CorruptSegmentError(f"{path} is missing: {remedy}")
    content = pa.memory_map(str(path)).read_buffer()
    if content.size != entry.size_bytes:
        raise CorruptSegmentError(f"{path} has {content.size} bytes instead of {entry.size_bytes}: {remedy}")
    if (found := _checksum(content)) != entry.checksum:
        raise CorruptSegmentError(f"{path} has checksum {found} instead of {entry.checksum}: {remedy}")
    if not pa.ipc.read_schema(content).equals(schema, check_metadata=True):
        raise CorruptSegmentError(f"{path} holds rows of another schema: {remedy}")
    return content


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _measure(path: Path) -> SealedFile:
    with pa.memory_map(str(path)) as file:
        content = file.read_buffer()
        return SealedFile(content.size, _checksum(content))


def _checksum(content: pa.Buffer) -> str:
    return xxhash.xxh3_128(memoryview(content)).hexdigest()
