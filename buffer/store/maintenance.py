"""Maintenance of a shard: evicts and drops rows, deletes sealed segments that are not needed, and rewrites segments
without the rows that are not needed, while the store works.

    plan     what to rewrite, decided by the store                                  quick
    run      archive rows that are removed, write the new file; it reads files      slow, in any thread
             that never change, so the store works meanwhile
    finish   one transaction of the catalog, then delete the old files              quick

Rows that become unneeded while `run` works are still in the new file; a later rewriting removes them. A reader that has
mapped an old file can use it until it unmaps the file.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from buffer.disk import sync_folder
from buffer.processes import run_id
from buffer.settings import BufferSettings
from buffer.store.catalog import FACTS, BatchEntry, Deletion, EventEntry, RemovalReason, SegmentEntry, segment_path
from buffer.store.gather import mark_null_items
from buffer.store.segments import MessageEncoder, message_checksum
from buffer.store.shard import Shard
from buffer.store.table import NO_ROWS, NOT_STORED
from buffer.trajectory.schema import ROW, SOURCES, rows_of
from buffer.trajectory.staleness import Int32, Int64, VersionRange, stale_rows

BATCH_ROWS = 2**12
BATCH_BYTES = 2**22
"""Approximate sizes of the batches that a rewriting writes."""

SMALL_FRACTION = 0.25
"""A segment below this fraction of `segment_bytes` joins its neighbors in a rewriting."""

FIRST_RETRY_S = 1.0
LONGEST_RETRY_S = 60.0
"""Pauses after a failed rewriting; each is twice as long as the one before."""

logger = logging.getLogger(__name__)


class SegmentUse(NamedTuple):
    """A sealed segment. needed: fraction of its rows that are live or pinned."""

    number: int
    size: int
    needed: float


def worth_rewriting(segments: Sequence[SegmentUse], below_fraction: float, segment_bytes: int) -> list[int]:
    """Numbers of neighbors whose needed rows fit into one segment; none where a rewriting would gain little.

    A run of them holds at least one segment of which less than `below_fraction` is needed, or as many small ones as
    make a large one. Small neighbors join, so that compaction does not leave ever more small files behind.
    """
    best: list[int] = []
    run: list[int] = []
    run_bytes, has_sparse = 0.0, False
    for segment in segments:
        needed_bytes = segment.needed * segment.size
        is_sparse = segment.needed < below_fraction
        joins = is_sparse or segment.size < SMALL_FRACTION * segment_bytes
        if not joins or run_bytes + needed_bytes > segment_bytes:
            run, run_bytes, has_sparse = [], 0.0, False
        if joins:
            run = [*run, segment.number]
            run_bytes += needed_bytes
            has_sparse |= is_sparse
            if (has_sparse or len(run) * SMALL_FRACTION >= 1) and len(run) > len(best):
                best = run
    return best


class Archive:
    """Rows that leave the disk of a shard, kept at any fsspec URL (s3://, gs://, file://, ...); used in any thread.

        <url>/<run_id>/<buffer>/<shard>/segment-000003.arrows    the rows that left with segment 3, as a segment

    A row is written when the file that holds it is about to go, so each one stands there once: rows that stay move on
    to another file, with which they leave one day. An upload that is repeated writes the same name again.
    """

    def __init__(self, url: str, folder: Path) -> None:
        """folder: of the shard, in that of the buffer, in that of the run. ValueError where no file system goes by the
        URL's protocol, or the package for it is missing."""
        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ValueError(f"buffer.archive={url}: {error}") from None
        buffer, shard = folder.resolve().parts[-2:]
        self._folder = "/".join([root.rstrip("/"), run_id(folder.resolve().parents[1]), buffer, shard])

    def write(self, number: int, rows: pa.Table) -> None:
        """Keep rows that leave with segment `number`; OSError where it could not be done."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows)
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
            raise OSError(f"the archive did not take {target}: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class RewritePlan:
    """Neighboring segments, and which rows of them stay.

    batches: of each segment, with its content. kept_rows: ascending. number: of the new file. archive: where the other
    rows go, None = nowhere.
    """

    folder: Path
    schema: pa.Schema
    batches: dict[int, tuple[pa.Buffer, tuple[BatchEntry, ...]]]
    kept_rows: Int64
    number: int
    archive: Archive | None

    def run(self) -> Rewrite:
        """Do it, except for what `finish` does. OSError: the disk or the archive refused, and nothing has changed."""
        kept: list[pa.Table] = []
        leaving: list[pa.Table] = []
        facts = [ROW, "id", "source"]
        for number, (content, batches) in self.batches.items():
            parts = (content.slice(each.offset, each.length) for each in batches)
            stored = pa.Table.from_batches((pa.ipc.read_record_batch(each, self.schema) for each in parts), self.schema)
            is_kept = pa.array(np.isin(stored.column(ROW).to_numpy(), self.kept_rows, assume_unique=True))
            kept.append(stored.filter(is_kept))
            gone = stored.select(self.schema.names if self.archive else facts).filter(pc.invert(is_kept))
            if self.archive is not None and gone.num_rows:
                self.archive.write(number, gone)
            leaving.append(gone.select(facts))
        return Rewrite(self, self._write(pa.concat_tables(kept)), _deletions(pa.concat_tables(leaving)))

    def _write(self, kept: pa.Table) -> list[BatchEntry]:
        written: list[BatchEntry] = []
        if not kept.num_rows:
            return written
        kept = kept.combine_chunks()
        batch_rows = min(BATCH_ROWS, max(1, kept.num_rows * BATCH_BYTES // kept.nbytes))
        encoder, header = MessageEncoder(self.schema), self.schema.serialize()
        with segment_path(self.folder, self.number).open("wb") as file:
            file.write(header)
            for batch in kept.to_batches(batch_rows):
                message = encoder.encode(mark_null_items(batch))  # a filter leaves anything under a null
                rows, versions = rows_of(batch), VersionRange.from_batch(batch)
                written.append(
                    BatchEntry(
                        first_row=int(rows[0]),
                        num_rows=len(rows),
                        segment=self.number,
                        offset=file.tell(),
                        length=len(message),
                        newest_version=int(versions.newest.max()),
                        message_checksum=message_checksum(message),
                        rows=rows.tobytes(),
                        facts=b"",
                    )
                )
                file.write(message)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.folder)
        return written


@dataclass(frozen=True)
class Rewrite:
    """A rewriting that waits for its transaction. written: batches of the new segment, without `facts`; none where no
    row stays. deletions: events of the rows that leave."""

    plan: RewritePlan
    written: list[BatchEntry]
    deletions: list[EventEntry]


def _deletions(leaving: pa.Table) -> list[EventEntry]:
    found = []
    for source in SOURCES:
        own = leaving.filter(pc.field("source") == source)
        if own.num_rows:
            rows, ids = own.column(ROW).to_numpy().tobytes(), json.dumps(own.column("id").to_pylist())
            found.append(EventEntry("delete", source=source, rows=rows, ids=ids))
    return found


class Maintenance:
    """`plan` and `finish` enclose what may take long; all else is quick and belongs to the operations of the store.

    What a loss of power takes of a removal is done again: the rows are judged anew. So no removal is synced by itself.
    OSError of any method: the disk refused; what is noted has happened, the rest is due the next time.
    """

    def __init__(
        self, settings: BufferSettings, shard: Shard, archive: Archive | None, clock: Callable[[], float]
    ) -> None:
        """archive: of the rows that leave the disk, None = they are deleted. clock: seconds since the epoch."""
        self._settings = settings
        self._shard = shard
        self._archive = archive
        self._clock = clock
        self._swept: tuple[int, ...] = ()  # what the last look for stale rows went by
        self._is_rewriting = False
        self._retry_s = FIRST_RETRY_S
        self._next_try_s = 0.0  # on the monotonic clock
        self.error: str | None = None
        """Why the last rewriting failed; None where it did not."""

    # Rows

    def evict(self) -> None:
        """Remove what the settings leave no place for."""
        self._evict_aged()
        table = self._shard.table
        for source in SOURCES:
            if (excess := table.num_live(source) - self._settings.capacity) > 0:
                self._remove(source, "capacity", table.oldest(source, excess))

    def evict_oversampled(self) -> None:
        """After an opening: `max_times_sampled` may be lower than when the folder was written."""
        table = self._shard.table
        for source in SOURCES:
            rows = table.live_rows(source)
            self._remove(source, "sampled", self.exhausted(rows, table.times_sampled[table.slots(rows)]))

    def drop_stale(self) -> None:
        """Remove what must not be sampled; staleness counts from the newest version known."""
        self._evict_aged()
        shard, max_staleness = self._shard, self._settings.max_staleness
        state = (shard.newest_version, shard.first_version, shard.next_row)
        if state == self._swept:
            return
        limits: list[tuple[RemovalReason, int]] = [("stage", shard.first_version)]
        if max_staleness is not None:
            limits.append(("stale", shard.newest_version - max_staleness))
        for reason, oldest_allowed in limits:
            rows = shard.table.live_rows("policy")
            oldest = shard.table.oldest_version[shard.table.slots(rows)]
            self._remove("policy", reason, rows[stale_rows(oldest, oldest_allowed)])
        self._swept = state

    def exhausted(self, rows: Int64, times_sampled: Int32) -> Int64:
        """[k] those of these rows that were sampled `max_times_sampled` times or more, ascending."""
        limit = self._settings.max_times_sampled
        return NO_ROWS if limit is None else np.sort(rows[times_sampled >= limit])

    def removal(self, source: str, reason: RemovalReason, rows: Int64) -> list[EventEntry]:
        """The event of a removal; none where there are no rows."""
        if not len(rows):
            return []
        version = self._shard.newest_version
        return [EventEntry("remove", source=source, reason=reason, version=version, rows=rows.tobytes())]

    def _evict_aged(self) -> None:
        if self._settings.max_age_s is None:
            return
        table, limit_us = self._shard.table, int((self._clock() - self._settings.max_age_s) * 1e6)
        for source in SOURCES:
            rows = table.live_rows(source)
            self._remove(source, "age", rows[table.created_us[table.slots(rows)] < limit_us])

    def _remove(self, source: str, reason: RemovalReason, rows: Int64) -> None:
        for event in self.removal(source, reason, rows):
            self._shard.record(event, durable=False)

    # Files

    def delete_unneeded(self) -> None:
        """Delete files of which no row is needed, unless they are to be archived."""
        if self._archive is None and not self._is_rewriting and (numbers := self._unneeded()):
            self._replace(self._plan(numbers).run())

    def plan(self) -> RewritePlan | None:
        """Evict what is too old, then find a rewriting that is worth it; None where none is, one is under way, or the
        last one failed just now. `RewritePlan.run` may go on in any thread while the store works; `finish` comes next,
        or `fail` with the error."""
        self.evict()
        self.delete_unneeded()
        if self._is_rewriting or time.monotonic() < self._next_try_s:
            return None
        numbers = self._unneeded() or self._sparse()
        self._is_rewriting = bool(numbers)
        return self._plan(numbers) if numbers else None

    def finish(self, rewrite: Rewrite) -> None:
        """The rewriting counts from now on. After an OSError `fail` comes next."""
        self._replace(rewrite)
        self._is_rewriting = False
        self._retry_s = FIRST_RETRY_S
        self.error = None

    def fail(self, error: OSError) -> None:
        """The rewriting failed: it is tried again later, and until then what it would have deleted stays."""
        self._is_rewriting = False
        self.error = str(error)
        self._next_try_s = time.monotonic() + self._retry_s
        logger.warning("%s; nothing was deleted, and it is tried again in %.0f s", error, self._retry_s)
        self._retry_s = min(2 * self._retry_s, LONGEST_RETRY_S)

    def _unneeded(self) -> list[int]:
        shard, table = self._shard, self._shard.table
        sealed = (each for each in shard.segments.stored.values() if each.size is not None)
        dead = [each.number for each in sealed if not table.live_in[each.number]]
        if not dead:
            return []
        pinned = np.unique(table.segment[table.slots(shard.pinned_rows)])
        return [number for number in dead if number not in pinned]

    def _sparse(self) -> list[int]:
        shard, table = self._shard, self._shard.table
        pinned = shard.pinned_rows
        dead = pinned[~table.is_live(pinned)]
        num_needed = table.live_in + Counter(table.segment[table.slots(dead)].tolist())
        uses = []
        for each in sorted(shard.segments.stored.values(), key=lambda each: each.batches[:1]):
            if each.size is not None:
                num_rows = sum(batch.num_rows for batch in each.batches)
                uses.append(SegmentUse(each.number, each.size, num_needed[each.number] / max(num_rows, 1)))
        return worth_rewriting(uses, self._settings.compaction_threshold, shard.segments.capacity_bytes)

    def _plan(self, numbers: Sequence[int]) -> RewritePlan:
        table, segments, pinned = self._shard.table, self._shard.segments, self._shard.pinned_rows
        is_kept = table.live[table.filled].copy()
        is_kept[table.slots(pinned)] = True
        is_kept &= np.isin(table.segment[table.filled], numbers)
        batches = {each: (segments.content(each), tuple(segments.stored[each].batches)) for each in numbers}
        kept_rows = np.flatnonzero(is_kept) + table.base
        return RewritePlan(segments.folder, segments.schema, batches, kept_rows, segments.take_number(), self._archive)

    def _replace(self, rewrite: Rewrite) -> None:
        shard, table, old, new = self._shard, self._shard.table, list(rewrite.plan.batches), rewrite.plan.number
        firsts = [entry.first_row for _, entries in rewrite.plan.batches.values() for entry in entries]
        entries = [entry._replace(facts=self._facts(entry.row_numbers)) for entry in rewrite.written]
        written = [SegmentEntry(new, entries[-1].offset + entries[-1].length)] if entries else []
        shard.catalog.commit([Deletion(firsts, old), *written, *entries, *rewrite.deletions])
        for segment in written:
            shard.segments.add(segment)
        for entry in entries:
            table.move(entry.row_numbers, new)
            shard.add_message(entry)
        leaving = np.concatenate([NO_ROWS, *(event.row_numbers for event in rewrite.deletions)])
        shard.known.delete(table.hash[table.slots(leaving)])
        table.move(leaving, NOT_STORED)
        for number in old:
            del table.live_in[number]
            shard.gather.forget(number)
            shard.segments.remove(number)

    def _facts(self, rows: Int64) -> bytes:
        facts = np.empty(len(rows), FACTS)
        for name in FACTS.names or ():
            facts[name] = getattr(self._shard.table, name)[self._shard.table.slots(rows)]
        return facts.tobytes()
