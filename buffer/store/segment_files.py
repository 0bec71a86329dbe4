"""The rows of a shard and the files that hold them: open segments, sealed ones, and the manifest.

    append      bytes in the open segment: acknowledged
    begin       the open segment is full: rows come into a new one from now on
    seal        the full one has a second name, rows noted in the log, manifest, the first name goes
    delete      manifest, then files in which no row is needed go
    rewrite     see `buffer.store.compaction`

After a crash between any two steps the manifest says which files count, and the others are deleted: the sealed ones
that it lists, and every open one from its `open_segment` on. All are read from mapped files.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from buffer.settings import BufferSettings
from buffer.store.archive import Archive
from buffer.store.compaction import Rewrite, RewritePlan
from buffer.store.manifest import Manifest, SegmentEntry
from buffer.store.row_numbers import Int64
from buffer.store.row_table import RowTable
from buffer.store.sealing import Seal, SealPlan
from buffer.store.segment_folder import FoundSegment
from buffer.store.segment_set import SegmentSet
from buffer.store.segments import OpenSegment, open_path, sealed_path
from buffer.trajectory.schema import rows_of

_ROOM = 1.25
"""How large an open segment is expected to grow, in shares of what fills it: the last batch goes beyond that."""


@dataclass(frozen=True)
class _FullSegment:
    """An open segment that takes no more rows."""

    number: int
    file: OpenSegment


class SegmentFiles:
    """Bytes only: which rows are live is told to it. Not thread-safe."""

    def __init__(self, folder: Path, schema: pa.Schema, settings: BufferSettings, manifest: Manifest) -> None:
        """manifest: of the folder, whose sealed segments and open rows `restore` and `restore_open` bring in."""
        self._folder = folder
        self._schema = schema
        self._settings = settings
        self._manifest = manifest
        self._table = RowTable(schema)
        self._sealed = SegmentSet()
        self._rewriting: tuple[SegmentEntry, ...] = ()
        self._full: deque[_FullSegment] = deque()
        self._open_number = manifest.open_segment
        self._open = self._open_segment(self._open_number)

    @property
    def entries(self) -> tuple[SegmentEntry, ...]:
        """Sealed segments, by row."""
        return self._sealed.entries

    @property
    def size_bytes(self) -> int:
        """Of the files that count."""
        open_bytes = sum(full.file.size_bytes for full in self._full) + self._open.size_bytes
        return open_bytes + sum(entry.size_bytes for entry in self._sealed.entries)

    @property
    def is_full(self) -> bool:
        """Whether it is time to `begin_segment`."""
        return self._open.size_bytes >= self._settings.segment_bytes and not self._open.is_empty

    @property
    def has_full(self) -> bool:
        """Whether a full segment is to be sealed."""
        return bool(self._full)

    def restore(self, entry: SegmentEntry, segment: FoundSegment, num_live: int) -> None:
        """A sealed segment that the manifest lists, mapped."""
        self._table.append(entry.number, lambda: segment.content, segment.rows)
        self._sealed.add(entry, num_live)

    def restore_open(self, number: int, segment: FoundSegment) -> None:
        """What an open segment holds; in the order of their numbers, the first one is that of the manifest."""
        if number != self._open_number:
            self._go_on_in(number, self._open_segment(number))
        if segment.batches:
            self._table.append(number, self._open.content, segment.rows)

    def append(self, batch: pa.RecordBatch) -> None:
        """Store rows that come after all others: at least one.

        Raises:
            OSError: the disk refused; nothing has changed.
        """
        self._open.append(batch)
        self._table.append(self._open_number, self._open.content, rows_of(batch))

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

    def begin_segment(self) -> None:
        """Have rows come into a new open segment from now on; the one before is full.

        Raises:
            OSError: the disk refused; nothing has changed.
        """
        number = self._manifest.next_segment
        self._go_on_in(number, self._open_segment(number))
        self._manifest = replace(self._manifest, next_segment=number + 1)

    def plan_seal(self) -> SealPlan:
        """What seals the full segment that comes first; there is one."""
        return SealPlan(self._folder, self._schema, self._full[0].number)

    def finish_seal(self, seal: Seal, num_live: int) -> None:
        """The first full segment counts as sealed from now on, and its first name goes.

        Raises:
            OSError: the disk refused; the full segment stays.
        """
        entry, next_open = seal.entry, self._full[1].number if len(self._full) > 1 else self._open_number
        assert entry.number == self._full[0].number, "segments are sealed in their order"
        manifest = replace(
            self._manifest,
            open_segment=next_open,
            next_row=entry.last_row + 1,
            segments=(*self._manifest.segments, entry),
        )
        self._write_manifest(manifest)
        self._table.move(entry.number, seal.content)
        self._sealed.add(entry, num_live)
        self._full.popleft().file.delete()

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
            self._table.remove([entry.number])
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
            contents=tuple(self._table.content(entry.number) for entry in entries),
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
        numbers = [entry.number for entry in old]
        if new is None or rewrite.content is None:
            self._table.remove(numbers)
        else:
            self._table.replace(numbers, new.number, rewrite.content)
        self._unlink(old)

    def abandon_rewrite(self) -> None:
        """A rewriting failed; what it left behind goes when the folder is opened next."""
        self._rewriting = ()

    def prepare_sync(self) -> Callable[[], None]:
        """See `OpenSegment.prepare_sync`."""
        syncs = [file.prepare_sync() for file in self._open_files()]

        def sync() -> None:
            for each in syncs:
                each()

        return sync

    def close(self) -> None:
        """Make everything durable and let go of the open segments."""
        for file in self._open_files():
            file.close()

    def _open_files(self) -> list[OpenSegment]:
        return [*(full.file for full in self._full), self._open]

    def _go_on_in(self, number: int, file: OpenSegment) -> None:
        self._full.append(_FullSegment(self._open_number, self._open))
        self._open_number, self._open = number, file

    def _open_segment(self, number: int) -> OpenSegment:
        path, sync_each_batch = open_path(self._folder, number), self._settings.fsync == "batch"
        return OpenSegment(path, self._schema, sync_each_batch, int(_ROOM * self._settings.segment_bytes))

    def _unlink(self, entries: Sequence[SegmentEntry]) -> None:
        for entry in entries:
            sealed_path(self._folder, entry.number).unlink(missing_ok=True)

    def _write_manifest(self, manifest: Manifest) -> None:
        manifest.write(self._folder)
        self._manifest = manifest
