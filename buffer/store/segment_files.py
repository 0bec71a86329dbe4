"""The rows of a shard and the files that hold them: one open segment, sealed ones, and the manifest that lists them.

    append      bytes in the open segment: acknowledged
    seal        sealed file in place, rows noted in the log, manifest, the open file goes
    delete      manifest, then files in which no row is needed go
    rewrite     see `buffer.store.compaction`

After a crash between any two steps the manifest says which files count, and the others are deleted. Open rows lie on
the heap, sealed ones in mapped files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from buffer.settings import BufferSettings
from buffer.store.archive import Archive
from buffer.store.compaction import Rewrite, RewritePlan, seal_rows
from buffer.store.manifest import Manifest, SegmentEntry
from buffer.store.row_table import RowTable
from buffer.store.segment_set import SegmentSet
from buffer.store.segments import OpenSegment, map_sealed, open_path, sealed_path

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Seal:
    """A sealed copy of the open segment that waits for the manifest."""

    entry: SegmentEntry
    batches: tuple[pa.RecordBatch, ...]


class SegmentFiles:
    """Bytes only: which rows are live is told to it. Not thread-safe."""

    def __init__(self, folder: Path, schema: pa.Schema, settings: BufferSettings, manifest: Manifest) -> None:
        """manifest: of the folder, whose sealed segments and open rows `restore` and `restore_open` bring in."""
        self._folder = folder
        self._schema = schema
        self._settings = settings
        self._manifest = manifest
        self._table = RowTable()
        self._sealed = SegmentSet()
        self._rewriting: tuple[SegmentEntry, ...] = ()
        self._open = self._open_segment(manifest.open_segment)

    @property
    def entries(self) -> tuple[SegmentEntry, ...]:
        """Sealed segments, by row."""
        return self._sealed.entries

    @property
    def size_bytes(self) -> int:
        """Of the files that count."""
        return self._open.size_bytes + sum(entry.size_bytes for entry in self._sealed.entries)

    @property
    def is_full(self) -> bool:
        """Whether it is time to `seal`."""
        return self._open.size_bytes >= self._settings.segment_bytes

    def restore(self, entry: SegmentEntry, batches: Sequence[pa.RecordBatch], num_live: int) -> None:
        """A sealed segment that the manifest lists, mapped."""
        self._table.append(batches, on_heap=False)
        self._sealed.add(entry, num_live)

    def restore_open(self, batches: Sequence[pa.RecordBatch]) -> None:
        """What the open segment holds."""
        self._table.append(batches, on_heap=True)

    def append(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Store rows that come after all others; gives them as views of the written bytes.

        Raises:
            OSError: the disk refused; nothing has changed.
        """
        stored = self._open.append(batch)
        self._table.append([stored], on_heap=True)
        return stored

    def take(self, rows: Int64) -> pa.RecordBatch:
        """See `RowTable.take`."""
        return self._table.take(rows)

    def ids(self, rows: Int64) -> pa.StringArray:
        """See `RowTable.ids`."""
        return self._table.ids(rows)

    def holds(self, rows: Int64) -> bool:
        """See `RowTable.holds`."""
        return self._table.holds(rows)

    def lose(self, rows: Int64) -> None:
        """These rows are no longer live."""
        self._sealed.lose(rows)

    def begin_seal(self) -> Seal:
        """Write the open segment, which is not empty, as a sealed one beside it.

        Raises:
            OSError: the disk refused; nothing has changed.
        """
        batches = self._table.batches(self._manifest.next_row)
        entry = seal_rows(self._folder, self._manifest.open_segment, batches, self._schema)
        return Seal(entry, tuple(map_sealed(self._folder, entry, self._schema)))

    def finish_seal(self, seal: Seal, num_live: int) -> None:
        """The sealed segment counts from now on.

        Raises:
            OSError: the disk refused; the open segment goes on.
        """
        entry, number = seal.entry, self._manifest.next_segment
        opened = self._open_segment(number)
        manifest = replace(
            self._manifest,
            open_segment=number,
            next_segment=number + 1,
            next_row=entry.last_row + 1,
            segments=(*self._manifest.segments, entry),
        )
        try:
            self._write_manifest(manifest)
        except OSError:
            opened.close()
            raise
        self._table.replace(entry.first_row, entry.last_row + 1, seal.batches, on_heap=False)
        self._sealed.add(entry, num_live)
        old, self._open = self._open, opened
        old.delete()

    @property
    def has_dead(self) -> bool:
        """See `SegmentSet.has_dead`."""
        return self._sealed.has_dead

    def unneeded(self, pinned_rows: Int64) -> list[SegmentEntry]:
        """Segments of which no row is live or pinned."""
        return [entry for entry in self._sealed.unneeded(pinned_rows) if entry not in self._rewriting]

    def delete(self, entries: Sequence[SegmentEntry]) -> None:
        """Delete files of which nobody needs a row.

        Raises:
            OSError: the disk refused; a file that is left over goes when the folder is opened next.
        """
        gone = set(entries)
        kept = tuple(entry for entry in self._manifest.segments if entry not in gone)
        self._write_manifest(replace(self._manifest, segments=kept))
        for entry in entries:
            self._sealed.replace([entry], None)
            self._table.remove(entry.first_row, entry.last_row + 1)
        self._unlink(entries)

    def plan_rewrite(
        self, live_rows: Callable[[int, int], Int64], pinned_rows: Int64, archive: Archive | None
    ) -> RewritePlan | None:
        """What is most worth rewriting, None where nothing is, or a rewriting is not finished yet.

        live_rows: gives those in [first, end), ascending. With an archive, files that nobody needs leave this way too.
        """
        if self._rewriting:
            return None
        entries = self.unneeded(pinned_rows)[:1] if archive is not None else []
        if not entries:
            below_share, segment_bytes = self._settings.compact_below, self._settings.segment_bytes
            entries = self._sealed.worth_rewriting(pinned_rows, below_share, segment_bytes)
        if not entries:
            return None
        first, end = entries[0].first_row, entries[-1].last_row + 1
        pinned = pinned_rows[np.searchsorted(pinned_rows, first) : np.searchsorted(pinned_rows, end)]
        self._rewriting = tuple(entries)
        number = self._manifest.next_segment
        self._manifest = replace(self._manifest, next_segment=number + 1)
        return RewritePlan(
            folder=self._folder,
            schema=self._schema,
            entries=self._rewriting,
            batches=tuple(self._table.batches(first, end)),
            kept_rows=np.union1d(live_rows(first, end), pinned),
            number=number,
            archive=archive,
        )

    def finish_rewrite(self, rewrite: Rewrite) -> None:
        """The new file counts from now on, and the old ones go.

        Raises:
            OSError: the disk refused; the old files go on, or those that were not deleted go when the folder is opened.
        """
        old, new = rewrite.plan.entries, rewrite.entry
        at = self._manifest.segments.index(old[0])
        segments = list(self._manifest.segments)
        segments[at : at + len(old)] = [] if new is None else [new]
        try:
            self._write_manifest(replace(self._manifest, segments=tuple(segments)))
        except OSError:
            if new is not None:
                sealed_path(self._folder, new.number).unlink(missing_ok=True)
            raise
        self._rewriting = ()
        self._sealed.replace(old, new)
        self._table.replace(old[0].first_row, old[-1].last_row + 1, rewrite.batches, on_heap=False)
        self._unlink(old)

    def abandon_rewrite(self) -> None:
        """A rewriting failed; what it left behind goes when the folder is opened next."""
        self._rewriting = ()

    def prepare_sync(self) -> Callable[[], None]:
        """See `OpenSegment.prepare_sync`."""
        return self._open.prepare_sync()

    def close(self) -> None:
        """Make everything durable and let go of the open segment."""
        self._open.close()

    def _open_segment(self, number: int) -> OpenSegment:
        return OpenSegment(open_path(self._folder, number), self._schema, self._settings.fsync == "batch")

    def _unlink(self, entries: Sequence[SegmentEntry]) -> None:
        for entry in entries:
            sealed_path(self._folder, entry.number).unlink(missing_ok=True)

    def _write_manifest(self, manifest: Manifest) -> None:
        manifest.write(self._folder)
        self._manifest = manifest
