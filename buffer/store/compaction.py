"""Rewriting sealed segments without the rows that nobody needs any longer, beside the work of the store.

    plan     what to rewrite, decided by the store                                  quick
    run      archive what leaves, write the new file; reads files that never        slow, in any thread
             change, so the store goes on meanwhile
    finish   one transaction of the catalog, then the old files go                  quick

Rows that cease to be needed while it runs are in the new file all the same, and leave with a later rewriting. A reader
that has mapped an old file keeps it until it lets go.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from buffer.disk import sync_folder
from buffer.store.archive import Archive
from buffer.store.catalog import BatchEntry, EventEntry, segment_path
from buffer.store.gather import mark_null_items
from buffer.store.segments import MessageEncoder, message_checksum
from buffer.trajectory.schema import ROW, SOURCES, rows_of
from buffer.trajectory.staleness import VersionRange

Int64 = npt.NDArray[np.int64]

BATCH_ROWS = 2**12
BATCH_BYTES = 2**22
"""Rows are written in batches of up to these sizes, however few are left of those that they come from."""

SMALL_FRACTION = 0.25
"""A segment below this fraction of `segment_bytes` joins its neighbors in a rewriting."""


@dataclass(frozen=True)
class SegmentUse:
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


@dataclass(frozen=True)
class StoredMessage:
    """A message of rows in a segment, at the bytes [offset, offset + length)."""

    first_row: int
    num_rows: int
    offset: int
    length: int


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
        for number in self.messages:
            own: list[pa.RecordBatch] = []
            for batch in self._batches(number):
                mask = np.isin(rows_of(batch), self.kept_rows, assume_unique=True)
                kept += _filtered(batch, mask)
                own += _filtered(batch, ~mask)
            if self.archive is not None and own:
                self.archive.write(number, own, self.schema)
            leaving += [batch.select([ROW, "id", "source"]) for batch in own]
        return Rewrite(self, self._write(kept) if kept else (), _deletions(leaving))

    def _batches(self, number: int) -> Iterator[pa.RecordBatch]:
        content, messages = self.messages[number]
        for each in messages:
            yield pa.ipc.read_record_batch(content.slice(each.offset, each.length), self.schema)

    def _write(self, kept: Sequence[pa.RecordBatch]) -> tuple[BatchEntry, ...]:
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
        return tuple(written)


@dataclass(frozen=True)
class Rewrite:
    """A rewriting that waits for its transaction.

    written: batches of the new segment, none where no row stays; without `facts`. deletions: events of the rows that
    leave.
    """

    plan: RewritePlan
    written: tuple[BatchEntry, ...]
    deletions: tuple[EventEntry, ...]


def _filtered(batch: pa.RecordBatch, mask: npt.NDArray[np.bool_]) -> list[pa.RecordBatch]:
    if mask.all():
        return [batch]
    return [batch.filter(pa.array(mask))] if mask.any() else []


def _deletions(batches: Sequence[pa.RecordBatch]) -> tuple[EventEntry, ...]:
    found = []
    if batches:
        rows = pa.concat_batches(batches)
        for source in SOURCES:
            own = rows.filter(pc.equal(rows.column("source"), source))
            if own.num_rows:
                found.append(
                    EventEntry.new("delete", source=source, rows=rows_of(own), ids=own.column("id").to_pylist())
                )
    return tuple(found)


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
