"""Rewriting sealed segments without the rows that nobody needs any longer, beside the work of the store.

    plan     what to rewrite, decided by the store                                  quick
    run      archive what leaves, write and map the new file; reads files that      slow, in any thread
             never change, so the store goes on meanwhile
    commit   manifest, then the old files go; see `SegmentFiles.finish_rewrite`     quick

Rows that cease to be needed while it runs are in the new file all the same, and leave with a later rewriting. A reader
that has mapped an old file keeps it until it lets go.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from buffer.store.archive import Archive
from buffer.store.manifest import SegmentEntry
from buffer.store.row_numbers import Int64, contains
from buffer.store.sealed_segments import SealedFile, map_content, write_sealed
from buffer.store.segments import read_batches, sealed_path
from buffer.trajectory.schema import rows_of
from buffer.trajectory.staleness import VersionRange

BATCH_ROWS = 2**12
BATCH_BYTES = 2**22
"""Rows are written in batches of up to these sizes, however few are left of those that they come from."""


@dataclass(frozen=True)
class RewritePlan:
    """Neighbouring segments, what is in each, and which rows of them stay.

    kept_rows: ascending. number: of the new file. archive: where the other rows go, None = nowhere.
    """

    folder: Path
    schema: pa.Schema
    entries: tuple[SegmentEntry, ...]
    contents: tuple[pa.Buffer, ...]
    kept_rows: Int64
    number: int
    archive: Archive | None

    def run(self) -> Rewrite:
        """Do it, except for the commit.

        Raises:
            OSError: the disk refused, or the archive (`ArchiveError`); nothing has changed.
        """
        if self.archive is not None:
            for entry, content in zip(self.entries, self.contents, strict=True):
                if leaving := self._rows_of(content, stay=False):
                    self.archive.write(entry.number, leaving, self.schema)
        kept = [batch for content in self.contents for batch in self._rows_of(content, stay=True)]
        if not kept:
            return Rewrite(self, None, None)
        sealed = write_sealed(sealed_path(self.folder, self.number), _merged(kept), self.schema)
        new = entry_of(self.number, sealed, kept)
        return Rewrite(self, new, map_content(self.folder, new, self.schema))

    def _rows_of(self, content: pa.Buffer, stay: bool) -> list[pa.RecordBatch]:
        chosen = []
        for batch, _ in read_batches(content, self.schema):
            mask = contains(self.kept_rows, rows_of(batch)) == stay
            if mask.all():
                chosen.append(batch)
            elif mask.any():
                chosen.append(batch.filter(pa.array(mask)))
        return chosen


@dataclass(frozen=True)
class Rewrite:
    """A rewriting that waits for its commit. entry: of the new file; content: of it, mapped; None where no row
    stays."""

    plan: RewritePlan
    entry: SegmentEntry | None
    content: pa.Buffer | None


def entry_of(number: int, sealed: SealedFile, batches: Sequence[pa.RecordBatch]) -> SegmentEntry:
    """The entry for the manifest of the sealed segment `number`, which holds these batches."""
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


def _merged(batches: Sequence[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in fewer batches."""
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
    return (pa.concat_batches(group) for group in groups)
