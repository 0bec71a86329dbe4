"""Rewriting sealed segments without the rows that nobody needs any longer, beside the work of the store.

    plan     what to rewrite, decided by the store                                  quick
    run      archive what leaves, write and map the new file; reads files that      slow, in any thread
             never change, so the store goes on meanwhile
    commit   manifest, then the old files go; see `SegmentFiles.finish_rewrite`     quick

Rows that cease to be needed while it runs are in the new file all the same, and leave with a later rewriting. A reader
that has mapped an old file keeps it until it lets go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from buffer.schema import rows_of
from buffer.staleness import VersionRange
from buffer.store.archive import Archive
from buffer.store.manifest import SegmentEntry
from buffer.store.row_numbers import Int64, contains
from buffer.store.segments import map_sealed, sealed_path, write_sealed

BATCH_ROWS = 2**16
BATCH_BYTES = 2**28
"""Rows are written in batches of about these sizes, however small those are that they come from. The elements of a
column's lists are counted in 32 bits, which the second keeps."""


@dataclass(frozen=True)
class RewritePlan:
    """Neighbouring segments, their batches by row, and which rows of them stay.

    kept_rows: ascending. number: of the new file. archive: where the other rows go, None = nowhere.
    """

    folder: Path
    schema: pa.Schema
    entries: tuple[SegmentEntry, ...]
    batches: tuple[pa.RecordBatch, ...]
    kept_rows: Int64
    number: int
    archive: Archive | None

    def run(self) -> Rewrite:
        """Do it, except for the commit.

        Raises:
            OSError: the disk refused, or the archive (`ArchiveError`); nothing has changed.
        """
        if self.archive is not None:
            for entry in self.entries:
                if leaving := self._rows_of(entry, stay=False):
                    self.archive.write(entry.number, leaving, self.schema)
        kept = [batch for entry in self.entries for batch in self._rows_of(entry, stay=True)]
        if not kept:
            return Rewrite(self, None, ())
        entry = seal_rows(self.folder, self.number, kept, self.schema)
        return Rewrite(self, entry, tuple(map_sealed(self.folder, entry, self.schema)))

    def _rows_of(self, entry: SegmentEntry, stay: bool) -> list[pa.RecordBatch]:
        chosen = []
        for batch in self.batches:
            rows = rows_of(batch)
            if rows[0] < entry.first_row or rows[-1] > entry.last_row:
                continue
            mask = contains(self.kept_rows, rows) == stay
            if mask.all():
                chosen.append(batch)
            elif mask.any():
                chosen.append(batch.filter(pa.array(mask)))
        return chosen


@dataclass(frozen=True)
class Rewrite:
    """A rewriting that waits for its commit. entry, batches: of the new file; None and empty where no row stays."""

    plan: RewritePlan
    entry: SegmentEntry | None
    batches: tuple[pa.RecordBatch, ...]


def seal_rows(folder: Path, number: int, batches: Sequence[pa.RecordBatch], schema: pa.Schema) -> SegmentEntry:
    """Write stored rows as the sealed segment `number`; gives its entry for the manifest."""
    sealed = write_sealed(sealed_path(folder, number), _groups(batches), schema)
    ranges = [VersionRange.from_batch(batch) for batch in batches]
    return SegmentEntry(
        number=number,
        first_row=int(rows_of(batches[0])[0]),
        last_row=int(rows_of(batches[-1])[-1]),
        num_rows=sum(batch.num_rows for batch in batches),
        size_bytes=sealed.size_bytes,
        checksum=sealed.checksum,
        oldest_version=min(int(versions.oldest.min()) for versions in ranges),
        newest_version=max(int(versions.newest.max()) for versions in ranges),
    )


def _groups(batches: Sequence[pa.RecordBatch]) -> list[list[pa.RecordBatch]]:
    """Neighbours that become one batch: a draw from a segment costs time per batch that it touches."""
    groups: list[list[pa.RecordBatch]] = [[]]
    num_rows, size_bytes = 0, 0
    for batch in batches:
        batch_bytes = batch.get_total_buffer_size()  # `nbytes` looks behind the offsets of every list
        if groups[-1] and (num_rows + batch.num_rows > BATCH_ROWS or size_bytes + batch_bytes > BATCH_BYTES):
            groups.append([])
            num_rows, size_bytes = 0, 0
        groups[-1].append(batch)
        num_rows += batch.num_rows
        size_bytes += batch_bytes
    return groups
