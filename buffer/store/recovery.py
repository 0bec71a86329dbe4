"""Opens a shard: rebuilds the state in memory from its catalog and its segments.

The catalog is authoritative, and the segments are checked against it. A batch whose bytes changed is moved to
quarantine, and its live rows are removed with that reason. Complete batches behind the last batch of the catalog are
added to it, since an insert syncs its segment alone; the bytes of an unfinished insert are cut off.

    quarantine/segment-000003.arrows.1024-2048        damaged bytes of the segment
    quarantine/segment-000003.arrows.1024-2048.txt    what was wrong, and which rows were lost

The program never reads these files again; a user can recover rows from them by hand.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa

from buffer.disk import sync_folder
from buffer.settings import BufferSettings
from buffer.store.catalog import BatchEntry, Change, Deletion, EventEntry, SegmentEntry, corrupt, segment_path
from buffer.store.segments import create_segment, message_checksum, read_message
from buffer.store.shard import Shard
from buffer.store.table import NO_ROWS, NOT_STORED, REMEMBERED_ROWS, KnownIds, UInt64, hash_ids
from buffer.trajectory.schema import SOURCES, TokenContract, rows_of
from buffer.trajectory.staleness import NO_VERSION, Int64

QUARANTINE = "quarantine"

_MESSAGE_START = b"\xff\xff\xff\xff"
_MESSAGE_ALIGNMENT = 8

logger = logging.getLogger(__name__)


def open_shard(folder: Path, contract: TokenContract, settings: BufferSettings, clock: Callable[[], float]) -> Shard:
    """Open the files in the locked `folder`, or create them.

    Raises:
        CorruptStoreError: the catalog is damaged. OSError: the disk refused.
        ValueError: another version of this program wrote the folder, or the rows follow another token contract.
    """
    shard = Shard(folder, contract, settings, clock)
    try:
        _Recovery(shard).run()
    except BaseException:
        shard.catalog.close()
        raise
    return shard


def quarantined(folder: Path) -> tuple[str, ...]:
    """Names of the quarantined bytes since the folder was created."""
    return tuple(sorted(path.name.removesuffix(".txt") for path in (folder / QUARANTINE).glob("*.txt")))


class _Recovery:
    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._segments, self._batches = shard.catalog.read()
        self._contents: dict[int, pa.Buffer] = {}  # of the segments

    def run(self) -> None:
        shard = self._shard
        self._delete_unlisted()
        self._contents = {entry.number: self._map(entry) for entry in self._segments}
        if self._batches:
            rows = np.concatenate([entry.row_numbers for entry in self._batches])
            if (np.diff(rows) <= 0).any() or len(rows) != sum(entry.num_rows for entry in self._batches):
                raise corrupt(shard.catalog.path, "the row numbers of its batches do not ascend")
            facts = np.concatenate([entry.row_facts for entry in self._batches])
            segments = np.repeat(
                [entry.segment for entry in self._batches], [entry.num_rows for entry in self._batches]
            )
            shard.add_rows(rows, facts, segments, max(entry.newest_version for entry in self._batches))
        deleted = self._replay()
        num_found = np.count_nonzero(shard.table.is_stored) + sum(len(event.row_numbers) for event in deleted)
        if num_found != shard.next_row:
            raise corrupt(shard.catalog.path, f"it accounts for {num_found} rows of {shard.next_row}")
        damaged = [entry for entry in self._batches if not self._is_sound(entry)]
        if damaged:
            self._quarantine(damaged)
        lost = {entry.first_row for entry in damaged}
        for entry in self._batches:
            if entry.first_row not in lost:
                shard.add_message(entry)
        for segment in self._segments:
            if segment.size is None:
                self._finish_tail(segment.number)
        shard.segments.begin_inserts()
        shard.known = KnownIds(shard.table, _hashes(deleted))

    def _delete_unlisted(self) -> None:
        # A crash can leave a new file before its commit, or an old file after it.
        folder = self._shard.folder
        listed = {segment_path(folder, entry.number) for entry in self._segments}
        for path in set(folder.glob("segment-*")) - listed:
            path.unlink()

    def _map(self, entry: SegmentEntry) -> pa.Buffer:
        path, header = segment_path(self._shard.folder, entry.number), self._shard.segments.header.to_pybytes()
        if path.exists():
            if entry.size is not None and path.stat().st_size > entry.size:
                os.truncate(path, entry.size)
            with path.open("r+b") as file:
                found = file.read(len(header))
                if len(found) == len(header) and found != header:
                    # The schema is known, so no row is lost; Arrow needs it to read the file.
                    logger.warning("%s: the schema at its start was damaged; it is written again", path)
                    file.seek(0)
                    file.write(header)
        return self._shard.segments.add(entry)

    def _replay(self) -> list[EventEntry]:
        """Apply what happened; gives the deletions."""
        shard, removed, deleted = self._shard, [NO_ROWS], []
        for event in shard.catalog.events():
            source, rows = event.source or "", event.row_numbers
            match event.kind:
                case "delete":
                    shard.counts[source].inserted += len(rows)
                    deleted.append(event)
                case "remove":  # all at once, since there may be very many
                    shard.counts[source].removed[event.reason or ""] += len(rows)
                    version = NO_VERSION if event.version is None else event.version
                    shard.newest_version = max(shard.newest_version, version)
                    removed.append(rows)
                case _:
                    shard.apply(event)
        gone = np.concatenate(removed)
        shard.table.remove(gone[shard.table.is_live(gone)])
        return deleted

    # What is not as the catalog says

    def _is_sound(self, entry: BatchEntry) -> bool:
        message = memoryview(self._contents[entry.segment])[entry.offset : entry.offset + entry.length]
        return message_checksum(message) == entry.message_checksum

    def _quarantine(self, damaged: Sequence[BatchEntry]) -> None:
        shard, table = self._shard, self._shard.table
        lost = np.concatenate([entry.row_numbers for entry in damaged])
        for segment, entries in groupby(damaged, key=lambda entry: entry.segment):
            for start, end, rows in _ranges(entries):
                told = f"lost with it: those of its {len(rows)} rows ({rows[0]} to {rows[-1]}) still live"
                self._set_aside(segment, start, end, told)
        events: list[EventEntry] = []
        for index, source in enumerate(SOURCES):
            own = lost[table.source[table.slots(lost)] == index]
            live = own[table.is_live(own)]
            if len(live):
                version = shard.newest_version
                events.append(
                    EventEntry("remove", source=source, reason="quarantine", version=version, rows=live.tobytes())
                )
            if len(own):
                events.append(EventEntry("delete", source=source, rows=own.tobytes()))
        for key, sample in shard.logged_samples.items():
            if np.isin(sample.rows, lost).any():
                logger.warning("%s: rows of %s are lost; on resume that step samples others", shard.folder, key)
                events.append(EventEntry("forget", stage=key.stage, step=key.step, source=key.source))
        changes: list[Change] = [Deletion([entry.first_row for entry in damaged]), *events]
        shard.catalog.commit(changes)
        for event in events:
            shard.apply(event)
        table.move(lost, NOT_STORED)

    def _set_aside(self, segment: int, start: int, end: int, lost: str) -> None:
        """Keep a copy of the damaged bytes [start, end) of a segment, which may be shorter, or missing. lost: what is
        lost with them."""
        path, content = segment_path(self._shard.folder, segment), self._contents[segment]
        folder = path.parent / QUARANTINE
        folder.mkdir(exist_ok=True)
        target, number = folder / f"{path.name}.{start}-{end}", 1
        while target.with_name(f"{target.name}.txt").exists():
            number += 1
            target = folder / f"{path.name}.{start}-{end}.{number}"
        reason = f"{path} is damaged from byte {start} to byte {end}" if content.size else f"{path} is missing"
        logger.warning("%s: %s; what is left of it is in %s", reason, lost, target)
        for name, written in (
            (f"{target.name}.txt", f"{reason}: {lost}\n".encode()),
            (target.name, memoryview(content)[start:end]),
        ):
            with (folder / name).open("wb") as file:
                file.write(written)
                file.flush()
                os.fsync(file.fileno())
            sync_folder(folder)

    def _finish_tail(self, number: int) -> None:
        """Of the segment that takes inserts: adopt what is complete behind the catalog's last batch, cut off the rest.
        It is read, not mapped: a mapped hole takes a page of memory on a tmpfs, which a full one does not have
        (SIGBUS)."""
        shard, segments, path = self._shard, self._shard.segments, segment_path(self._shard.folder, number)
        if not path.exists():
            create_segment(path, segments.header, 0)
        ends = (entry.offset + entry.length for entry in self._batches if entry.segment == number)
        start = max(ends, default=segments.header.size)
        with path.open("rb") as file:
            file.seek(start)
            tail = pa.py_buffer(file.read())
        taken = 0
        while (found := read_message(tail, taken, segments.schema)) is not None:
            batch, end = found
            rows = np.arange(shard.next_row, shard.next_row + batch.num_rows)
            if not np.array_equal(rows_of(batch), rows):
                break
            message = memoryview(tail)[taken:end]
            shard.add(batch, hash_ids(batch.column("id")), number, start + taken, message)
            taken = end
        rest = memoryview(tail)[taken:].tobytes().rstrip(b"\0")
        if rest and self._holds_message(tail, taken, rest):
            lost = "lost with it: rows that nobody had sampled yet"
            self._set_aside(number, start + taken, start + taken + len(rest), lost)
        elif rest:
            logger.warning("%s: cut %d bytes of an unfinished insert off its end", path, len(rest))
        end = segments.end_of(number)
        os.truncate(path, end)  # what follows is zeros then
        os.truncate(path, max(end, segments.capacity_bytes))
        segments.map(number)

    def _holds_message(self, tail: pa.Buffer, start: int, rest: bytes) -> bool:
        """Whether a complete batch begins in `rest`, which is what a tail holds from byte `start` on, behind its first
        byte."""
        at = rest.find(_MESSAGE_START, 1)
        while at >= 0:
            place = start + at
            if place % _MESSAGE_ALIGNMENT == 0 and read_message(tail, place, self._shard.segments.schema) is not None:
                return True
            at = rest.find(_MESSAGE_START, at + 1)
        return False


def _ranges(entries: Iterable[BatchEntry]) -> list[tuple[int, int, Int64]]:
    """Bytes [start, end) of batches of one segment, and their rows; batches that follow each other as one."""
    ranges: list[tuple[int, int, Int64]] = []
    for entry in entries:
        start, rows = entry.offset, entry.row_numbers
        if ranges and ranges[-1][1] == start:
            start, rows = ranges[-1][0], np.concatenate([ranges.pop()[2], rows])
        ranges.append((start, entry.offset + entry.length, rows))
    return ranges


def _hashes(deletions: Sequence[EventEntry]) -> UInt64:
    """Of the ids of the rows that were deleted last, as far as they are known."""
    num_rows, hashes = 0, [np.empty(0, np.uint64)]
    for event in reversed(deletions):
        if event.ids is not None:
            hashes.append(hash_ids(pa.array(json.loads(event.ids), pa.string())))
            if (num_rows := num_rows + len(hashes[-1])) >= REMEMBERED_ROWS:
                break
    return np.concatenate(hashes[::-1])
