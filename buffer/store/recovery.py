"""Opening a shard: from its catalog and its segments to what a store works with.

What the catalog says is what happened. The segments are checked against it: a batch whose bytes changed is put into
quarantine, and its live rows are removed for that reason. Complete batches behind the last one of the catalog are
adopted, since an insert syncs its segment alone; the bytes of an unfinished insert are cut off.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from buffer.settings import BufferSettings
from buffer.store.catalog import FACTS, REASONS, BatchEntry, EventEntry, SegmentEntry, corrupt, segment_path
from buffer.store.catalog_writer import CatalogWriter, Change, Deletion
from buffer.store.draws import NotedDraw, RepeatableDraws
from buffer.store.files import ShardFiles
from buffer.store.known_ids import REMEMBERED_ROWS, KnownIds, hash_ids
from buffer.store.quarantine import set_bytes_aside
from buffer.store.results import DrawKey, SourceCounters
from buffer.store.segments import create_segment, holds_message, message_checksum, read_tail, scan_tail, written_bytes
from buffer.store.table import NO_ROWS, NOT_STORED, ReplayTable, row_facts
from buffer.trajectory.schema import SOURCES, TokenContract, rows_of
from buffer.trajectory.staleness import NO_VERSION, VersionRange

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
T = TypeVar("T")

logger = logging.getLogger(__name__)


def _no_counts() -> dict[str, SourceCounters]:
    return {source: SourceCounters(removed=dict.fromkeys(REASONS, 0)) for source in SOURCES}


@dataclass
class ShardState:
    """A shard that is open. counts: by source. first_version: of the stage."""

    catalog: CatalogWriter
    table: ReplayTable
    files: ShardFiles
    known: KnownIds
    draws: RepeatableDraws = field(default_factory=RepeatableDraws)
    counts: dict[str, SourceCounters] = field(default_factory=_no_counts)
    newest_version: int = NO_VERSION
    first_version: int = 0
    rejected: int = 0


def open_shard(
    folder: Path, contract: TokenContract, settings: BufferSettings, clock: Callable[[], float]
) -> ShardState:
    """Open the files in `folder`, which is locked, or make them.

    Raises:
        CorruptStoreError: the catalog is damaged. OSError: the disk refused.
        ValueError: an earlier version of this program wrote the folder, or the rows follow another token contract.
    """
    _refuse_earlier_layout(folder)
    catalog = CatalogWriter(folder, contract, settings.fsync == "batch", clock)
    try:
        return _Recovery(folder, contract, settings, catalog).run()
    except BaseException:
        catalog.close()
        raise


def _refuse_earlier_layout(folder: Path) -> None:
    for pattern in ("manifest.json", "consumption-*.arrows*", "segment-*.arrows.open"):
        if found := sorted(folder.glob(pattern)):
            raise ValueError(
                f"{folder} holds {found[0].name}, which an earlier version of this program wrote and this one does not "
                "read: use another run folder"
            )


class _Recovery:
    """One opening of a shard."""

    def __init__(self, folder: Path, contract: TokenContract, settings: BufferSettings, catalog: CatalogWriter) -> None:
        self._folder = folder
        self._settings = settings
        self._contents = catalog.read()
        table = ReplayTable()
        files = ShardFiles(folder, contract, settings, catalog, table)
        files.next_row = self._contents.next_row
        self._deleted: list[tuple[int, str]] = []  # rows and ids of events
        self.state = ShardState(catalog, table, files, KnownIds(table.stored_hashes, np.empty(0, np.uint64)))

    def run(self) -> ShardState:
        """All of it."""
        state, files = self.state, self.state.files
        self._delete_unlisted()
        contents = {entry.number: self._map(entry) for entry in self._contents.segments}
        self._add_batches()
        num_deleted = self._replay(state.catalog.events())
        if (num_found := len(np.flatnonzero(state.table.segment[state.table.filled] != NOT_STORED)) + num_deleted) != (
            files.next_row
        ):
            raise corrupt(state.catalog.path, f"it accounts for {num_found} rows of {files.next_row}")
        ends = {segment.number: files.end_of(segment) for segment in files.segments.values()}
        damaged = [entry for entry in self._contents.batches if not _is_sound(contents[entry.segment], entry)]
        if damaged:
            self._quarantine(damaged, contents)
        for entry in self._contents.segments:
            if entry.size is None:
                self._finish_tail(entry.number, contents[entry.number], ends[entry.number])
        files.begin_inserts()
        state.known = KnownIds(state.table.stored_hashes, self._deleted_hashes())
        return state

    # Files and batches

    def _delete_unlisted(self) -> None:
        """What a crash left behind: a new file before its commit, an old one after it."""
        listed = {segment_path(self._folder, entry.number) for entry in self._contents.segments}
        for path in set(self._folder.glob("segment-*")) - listed:
            path.unlink()

    def _map(self, entry: SegmentEntry) -> pa.Buffer:
        path = segment_path(self._folder, entry.number)
        if entry.size is not None and path.exists() and path.stat().st_size > entry.size:
            os.truncate(path, entry.size)
        if path.exists():
            self._mend_header(path)
        return self.state.files.add(entry)

    def _mend_header(self, path: Path) -> None:
        """The schema is known: who reads the file with Arrow needs it, and it costs no row."""
        header = self.state.files.header.to_pybytes()
        with path.open("r+b") as file:
            found = file.read(len(header))
            if len(found) == len(header) and found != header:
                logger.warning("%s: the schema at its begin was damaged, and is written anew", path)
                file.seek(0)
                file.write(header)

    def _add_batches(self) -> None:
        batches = self._contents.batches
        if not batches:
            return
        rows = np.concatenate([entry.row_numbers for entry in batches])
        if (np.diff(rows) <= 0).any() or len(rows) != sum(entry.num_rows for entry in batches):
            raise corrupt(self.state.catalog.path, "the row numbers of its batches do not ascend")
        facts = np.frombuffer(b"".join(entry.facts for entry in batches), FACTS)
        segments = np.repeat([entry.segment for entry in batches], [entry.num_rows for entry in batches])
        self.state.table.add(rows, facts, segments.astype(np.int32))
        for entry in batches:
            self.state.files.add_batch(entry)
        self.state.newest_version = max(entry.newest_version for entry in batches)
        for source, count in _by_source(facts["source"]):
            self.state.counts[source].inserted += count

    # Events

    def _replay(self, events: Iterable[EventEntry]) -> int:
        """What is not live any more, how often rows were drawn, which draws may be repeated; gives how many rows were
        deleted."""
        state, table = self.state, self.state.table
        drawn, removed, num_deleted = [NO_ROWS], [NO_ROWS], 0
        for event in events:
            rows = event.row_numbers
            if event.kind != "stage":
                state.newest_version = max(state.newest_version, _given(event.version, NO_VERSION))
            match event.kind:
                case "draw":
                    drawn.append(rows)
                    self._add_draw(event, rows)
                case "remove":
                    removed.append(rows)
                    state.counts[_given(event.source, "")].removed[_given(event.reason, "")] += len(rows)
                case "delete":
                    num_deleted += len(rows)
                    state.counts[_given(event.source, "")].inserted += len(rows)
                    if event.ids is not None:
                        self._deleted.append((len(rows), event.ids))
                case "checkpoint":
                    state.draws.release(_given(event.stage, ""), _given(event.step, 0))
                case "forget":
                    state.draws.forget(_key(event))
                case "stage":
                    state.first_version = _given(event.version, 0)
                case "reject":
                    state.rejected += len(json.loads(_given(event.ids, "[]")))
                case "priorities":
                    known = np.isin(rows, table.known(rows))
                    values = np.frombuffer(_given(event.priorities, b""), np.float32)
                    table.priority[table.slots(rows[known])] = values[known]
                case "version":
                    pass  # the version of every event is taken above
        gone = table.known(np.concatenate(removed))
        table.remove(gone[table.is_live(gone)])
        np.add.at(table.times_sampled, table.slots(table.known(np.concatenate(drawn))), 1)
        return num_deleted

    def _add_draw(self, event: EventEntry, rows: Int64) -> None:
        key, counts = _key(event), self.state.counts[_given(event.source, "")]
        counts.draws += self.state.draws.find(key) is None
        counts.drawn += len(rows)
        self.state.draws.add(key, NotedDraw(rows, _given(event.version, NO_VERSION), _given(event.whole, 0)))

    def _deleted_hashes(self) -> UInt64:
        """Of the ids of the rows that were deleted last."""
        num_rows, texts = 0, []
        for count, ids in reversed(self._deleted):
            texts.append(ids)
            if (num_rows := num_rows + count) >= REMEMBERED_ROWS:
                break
        hashes = [hash_ids(pa.array(json.loads(ids), pa.string())) for ids in reversed(texts)]
        return np.concatenate([np.empty(0, np.uint64), *hashes])

    # What is not as the catalog says

    def _quarantine(self, damaged: Sequence[BatchEntry], contents: dict[int, pa.Buffer]) -> None:
        """Put the bytes of these batches aside, and go on without their rows."""
        state, table = self.state, self.state.table
        lost = np.concatenate([entry.row_numbers for entry in damaged])
        for segment, entries in groupby(damaged, key=lambda entry: entry.segment):
            for start, end, rows in _ranges(list(entries)):
                told = f"lost with it: those of its {len(rows)} rows ({rows[0]} to {rows[-1]}) still live"
                set_bytes_aside(segment_path(self._folder, segment), contents[segment], start, end, told)
        changes: list[Change] = [Deletion([entry.first_row for entry in damaged])]
        for index, source in enumerate(SOURCES):
            own = lost[table.source[table.slots(lost)] == index]
            live = own[table.is_live(own)]
            version = state.newest_version
            if len(live):
                changes.append(EventEntry.new("remove", source=source, reason="quarantine", version=version, rows=live))
                state.counts[source].removed["quarantine"] += len(live)
            if len(own):
                changes.append(EventEntry.new("delete", source=source, rows=own))
        for key, draw in state.draws:
            if np.isin(draw.rows, lost).any():
                logger.warning("%s: rows of %s are lost; on resume that step draws others", self._folder, key)
                changes.append(EventEntry.new("forget", stage=key.stage, step=key.step, source=key.source))
                state.draws.forget(key)
        state.catalog.commit(changes, state.files.next_row)
        state.files.drop_batches(damaged)
        table.remove(lost[table.is_live(lost)])
        table.move(lost, NOT_STORED)

    def _finish_tail(self, number: int, content: pa.Buffer, start: int) -> None:
        """Of the segment that takes inserts: adopt what is complete from byte `start` on, cut off the rest."""
        files, path = self.state.files, segment_path(self._folder, number)
        if not path.exists():
            create_segment(path, files.header, 0)
        tail, taken = read_tail(path, start), 0
        for found in scan_tail(tail, files.schema):
            rows = rows_of(found.batch)
            if not np.array_equal(rows, np.arange(files.next_row, files.next_row + len(rows))):
                break
            self._adopt(number, found.batch, start + found.offset, tail.slice(found.offset, found.length))
            taken = found.offset + found.length
        num_bytes = written_bytes(tail, taken) if tail.size > taken else 0
        if num_bytes and holds_message(tail, taken + 1, files.schema):
            start += taken
            set_bytes_aside(path, content, start, start + num_bytes, "lost with it: rows that nobody had sampled yet")
        elif num_bytes:
            logger.warning("%s: cut %d bytes of an unfinished insert off its end", path, num_bytes)
        end = files.end_of(files.segments[number])
        os.truncate(path, end)  # what follows is zeros then
        os.truncate(path, max(end, files.room))
        files.maps.map(number)

    def _adopt(self, segment: int, batch: pa.RecordBatch, offset: int, message: pa.Buffer) -> None:
        """A complete batch that is not in the catalog."""
        state, table = self.state, self.state.table
        versions = VersionRange.from_batch(batch)
        priorities = {source: table.largest_priority(source) for source in SOURCES}
        facts = row_facts(batch, hash_ids(batch.column("id")), versions, priorities)
        newest_version = int(versions.newest.max())
        state.files.commit_batch(
            BatchEntry(
                first_row=state.files.next_row,
                num_rows=batch.num_rows,
                segment=segment,
                offset=offset,
                length=message.size,
                newest_version=newest_version,
                message_checksum=message_checksum(message),
                rows=None,
                facts=facts.tobytes(),
            ),
            facts,
        )
        state.newest_version = max(state.newest_version, newest_version)
        for source, count in _by_source(facts["source"]):
            state.counts[source].inserted += count


def _is_sound(content: pa.Buffer, entry: BatchEntry) -> bool:
    message = memoryview(content)[entry.offset : entry.offset + entry.length]
    return message_checksum(message) == entry.message_checksum


def _ranges(entries: Sequence[BatchEntry]) -> list[tuple[int, int, Int64]]:
    """Bytes [start, end) of batches of one segment, and their rows; batches that follow each other as one."""
    ranges: list[tuple[int, int, Int64]] = []
    for entry in entries:
        start, rows = entry.offset, entry.row_numbers
        if ranges and ranges[-1][1] == start:
            start, rows = ranges[-1][0], np.concatenate([ranges.pop()[2], rows])
        ranges.append((start, entry.offset + entry.length, rows))
    return ranges


def _by_source(codes: npt.NDArray[np.uint8]) -> list[tuple[str, int]]:
    return list(zip(SOURCES, np.bincount(codes, minlength=len(SOURCES)).tolist(), strict=True))


def _key(event: EventEntry) -> DrawKey:
    return DrawKey(_given(event.stage, ""), _given(event.step, 0), _given(event.source, ""))


def _given(value: T | None, default: T) -> T:
    return default if value is None else value
