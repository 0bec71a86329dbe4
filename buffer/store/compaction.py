"""Rewriting sealed segments without the rows that nobody needs any longer, beside the work of the store.

    plan     what to rewrite, decided by the store                                  quick
    run      archive what leaves, write the new file; reads files that never        slow, in any thread
             change, so the store goes on meanwhile
    finish   one transaction of the catalog, then the old files go                  quick

Rows that cease to be needed while it runs are in the new file all the same, and leave with a later rewriting. A reader
that has mapped an old file keeps it until it lets go.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from buffer.disk import sync_folder
from buffer.run_identity import run_id
from buffer.store.catalog import BatchEntry, EventEntry, segment_path
from buffer.store.gather import mark_null_items
from buffer.store.segments import MessageEncoder, StoredMessage, message_checksum
from buffer.trajectory.schema import ROW, SOURCES, rows_of
from buffer.trajectory.staleness import VersionRange

Int64 = npt.NDArray[np.int64]

BATCH_ROWS = 2**12
BATCH_BYTES = 2**22
"""Rows are written in batches of up to these sizes, however few are left of those that they come from."""

SMALL_FRACTION = 0.25
"""A segment below this fraction of `segment_bytes` joins its neighbors in a rewriting."""


class SegmentUse(NamedTuple):
    """A sealed segment. num_needed: rows of it that are live or pinned."""

    number: int
    size: int
    num_rows: int
    num_needed: int


def worth_rewriting(segments: Sequence[SegmentUse], below_fraction: float, segment_bytes: int) -> list[int]:
    """Numbers of neighbors whose needed rows fit into one segment; none where a rewriting would gain little.

    A run of them holds at least one segment of which less than `below_fraction` is needed, or as many small ones as
    make a large one. Small neighbors join, so that compaction does not leave ever more small files behind.
    """
    best: list[int] = []
    run: list[int] = []
    run_bytes, has_sparse = 0.0, False
    for segment in segments:
        needed = segment.num_needed / max(segment.num_rows, 1)
        is_sparse = needed < below_fraction
        joins = is_sparse or segment.size < SMALL_FRACTION * segment_bytes
        if not joins or run_bytes + needed * segment.size > segment_bytes:
            run, run_bytes, has_sparse = [], 0.0, False
        if joins:
            run = [*run, segment.number]
            run_bytes += needed * segment.size
            has_sparse |= is_sparse
            if (has_sparse or len(run) * SMALL_FRACTION >= 1) and len(run) > len(best):
                best = run
    return best


class ArchiveError(OSError):
    """The archive did not take a file; nothing was deleted."""


class Archive:
    """Rows that leave the disk of a shard, kept at any fsspec URL (s3://, gs://, file://, ...); used in any thread.

        <url>/<run_id>/<buffer>/<shard>/segment-000003.arrows    the rows that left with segment 3, as a segment

    A row is written when the file that holds it is about to go, so each one stands there once: rows that stay move on
    to another file, with which they leave one day. An upload that is repeated writes the same name again.
    """

    def __init__(self, url: str, folder: Path) -> None:
        """folder: of the shard, in that of the buffer, in that of the run.

        Raises:
            ValueError: no file system goes by the URL's protocol, or the package for it is missing.
        """
        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ValueError(f"buffer.archive={url}: {error}") from None
        buffer, shard = folder.resolve().parts[-2:]
        self._folder = "/".join([root.rstrip("/"), run_id(folder.resolve().parents[1]), buffer, shard])

    def write(self, number: int, batches: Sequence[pa.RecordBatch], schema: pa.Schema) -> None:
        """Keep rows that leave with segment `number`.

        Raises:
            ArchiveError: it could not be done.
        """
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        target = f"{self._folder}/{segment_path(Path(), number).name}"
        try:
            self._files.makedirs(self._folder, exist_ok=True)
            # Object storage shows a file when it is complete; a folder does as soon as the file has its name.
            in_folder = "file" in self._files.protocol
            written = f"{target}.tmp" if in_folder else target
            self._files.pipe_file(written, sink.getvalue().to_pybytes())
            if in_folder:
                self._files.mv(written, target)
        except Exception as error:  # each file system raises the errors of its own client library
            raise ArchiveError(f"the archive did not take {target}: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class RewritePlan:
    """Neighboring segments, and which rows of them stay.

    messages: of each segment, with its content. kept_rows: ascending. number: of the new file. archive: where the other
    rows go, None = nowhere.
    """

    folder: Path
    schema: pa.Schema
    messages: dict[int, tuple[pa.Buffer, tuple[StoredMessage, ...]]]
    kept_rows: Int64
    number: int
    archive: Archive | None

    def run(self) -> Rewrite:
        """Do it, except for what `finish` does.

        Raises:
            OSError: the disk refused, or the archive (`ArchiveError`); nothing has changed.
        """
        kept: list[pa.RecordBatch] = []
        leaving: list[pa.RecordBatch] = []
        for number, (content, messages) in self.messages.items():
            own: list[pa.RecordBatch] = []
            for each in messages:
                batch = pa.ipc.read_record_batch(content.slice(each.offset, each.length), self.schema)
                mask = np.isin(rows_of(batch), self.kept_rows, assume_unique=True)
                kept += _filtered(batch, mask)
                own += _filtered(batch, ~mask)
            if self.archive is not None and own:
                self.archive.write(number, own, self.schema)
            leaving += [batch.select([ROW, "id", "source"]) for batch in own]
        return Rewrite(self, self._write(kept) if kept else [], _deletions(leaving))

    def _write(self, kept: Sequence[pa.RecordBatch]) -> list[BatchEntry]:
        encoder, header = MessageEncoder(self.schema), self.schema.serialize()
        written, path, offset = [], segment_path(self.folder, self.number), header.size
        with path.open("wb") as file:
            file.write(header)
            for batch in _merged(kept):
                message = encoder.encode(mark_null_items(batch))  # a filter leaves anything under a null
                file.write(message)
                rows, versions = rows_of(batch), VersionRange.from_batch(batch)
                written.append(
                    BatchEntry(
                        first_row=int(rows[0]),
                        num_rows=len(rows),
                        segment=self.number,
                        offset=offset,
                        length=len(message),
                        newest_version=int(versions.newest.max()),
                        message_checksum=message_checksum(message),
                        rows=rows.tobytes(),
                        facts=b"",
                    )
                )
                offset += len(message)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.folder)
        return written


@dataclass(frozen=True)
class Rewrite:
    """A rewriting that waits for its transaction.

    written: batches of the new segment, none where no row stays; without `facts`. deletions: events of the rows that
    leave.
    """

    plan: RewritePlan
    written: list[BatchEntry]
    deletions: list[EventEntry]


def _filtered(batch: pa.RecordBatch, mask: npt.NDArray[np.bool_]) -> list[pa.RecordBatch]:
    if mask.all():
        return [batch]
    return [batch.filter(pa.array(mask))] if mask.any() else []


def _deletions(batches: Sequence[pa.RecordBatch]) -> list[EventEntry]:
    if not batches:
        return []
    found, rows = [], pa.concat_batches(batches)
    for source in SOURCES:
        own = rows.filter(pc.equal(rows.column("source"), source))
        if own.num_rows:
            ids = json.dumps(own.column("id").to_pylist())
            found.append(EventEntry("delete", source=source, rows=rows_of(own).tobytes(), ids=ids))
    return found


def _merged(batches: Sequence[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in fewer batches."""
    groups: list[list[pa.RecordBatch]] = [[]]
    num_rows, num_bytes = 0, 0
    for batch in batches:
        batch_bytes = batch.get_total_buffer_size()  # `nbytes` looks behind the offsets of every list
        if groups[-1] and (num_rows + batch.num_rows > BATCH_ROWS or num_bytes + batch_bytes > BATCH_BYTES):
            groups.append([])
            num_rows, num_bytes = 0, 0
        groups[-1].append(batch)
        num_rows += batch.num_rows
        num_bytes += batch_bytes
    return (pa.concat_batches(group) for group in groups)
