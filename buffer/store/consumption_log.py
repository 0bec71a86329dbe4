"""The log of a shard: what was drawn, and the authority on which rows are still live.

An event is in the log before anything follows from it: a draw before it is answered, a removal before the row's bytes
may go. A file begins with a snapshot of the shard, so opening a log reads one file; older ones are history for
audits (`buffer.store.event_history`). What is live follows from it:

    rows of the snapshot + rows in segments from its next_row on - rows removed since

A draw has a key (stage, step, source). A learner that was killed and goes on from a checkpoint asks for the same keys
again and is given the same rows, whatever came into the buffer meanwhile. Rows of draws that no checkpoint covers yet
are *pinned*: they may cease to be live, but their bytes are kept.

Versions go on over a restart: weights that are published again on the way get new numbers, and a logged draw is
answered without looking at staleness, since its rows were fresh when they were first drawn. New draws count
staleness from the new numbers. They exceed the old ones by the publications that a restart adds or repeats, so a
bound on staleness is then kept more strictly, never less.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from buffer.store.event_history import (
    log_files,
    log_number,
    open_log_path,
    read_log_file,
    scan_log_file,
    sealed_log_path,
)
from buffer.store.event_record import EventRecord
from buffer.store.events import EVENT_SCHEMA, Event, EventKind, decode_events, encode_events
from buffer.store.log_state import DrawKey, LoggedDraw, LogSnapshot, LogState, release
from buffer.store.manifest import CorruptSegmentError, sync_folder
from buffer.store.row_numbers import NO_ROWS, Int64
from buffer.store.segments import OPEN_SUFFIX, OpenSegment, cut_torn_tail

__all__ = ["ROTATE_BYTES", "SNAPSHOTS_PER_FILE", "ConsumptionLog", "DrawKey", "LoggedDraw"]

logger = logging.getLogger(__name__)

ROTATE_BYTES = 8 * 2**20
"""A smaller file is not worth a new one."""

SNAPSHOTS_PER_FILE = 4
"""A file grows to this many times its snapshot, so that snapshots are a fixed share of what is written."""

_RECORDS = 64
"""Kinds of events to be quick with: draws differ in size, where there are several shards from one to the next."""


class ConsumptionLog:
    """Writes events, and keeps the draws that no durable checkpoint covers. Not thread-safe."""

    def __init__(
        self,
        folder: Path,
        sync_each_record: bool,
        clock: Callable[[], float],
        rotate_bytes: int = ROTATE_BYTES,
    ) -> None:
        """Open the log in `folder`, or begin one; an event that a crash left torn is cut off.

        sync_each_record: whether an event survives a loss of power; without, it survives the death of the process.
        clock: seconds since the epoch.

        Raises:
            CorruptSegmentError: the file is damaged before its last event.
        """
        self._folder = folder
        self._sync_each_record = sync_each_record
        self._clock = clock
        self._rotate_bytes = rotate_bytes
        self._draws: dict[DrawKey, LoggedDraw] = {}
        self._pinned: Int64 | None = None  # built on demand
        self._record = lru_cache(_RECORDS)(_numbered_record)
        path = self._find_open_file()
        self._number = log_number(path)
        scan = scan_log_file(path)
        if scan.torn_bytes:
            logger.warning("%s: cut %d bytes of an unfinished event off its end", path, scan.torn_bytes)
        self.cut_bytes = cut_torn_tail(path, scan)
        self._snapshot_bytes = scan.batches[0].nbytes
        self._restored = LogState()
        for record in scan.batches:
            self._restored.apply(decode_events(record))
        self._draws = self._restored.draws
        self._file = OpenSegment(path, EVENT_SCHEMA, sync_each_record)

    def take_state(self) -> LogState:
        """What the events added up to when the log was opened; the log forgets it with this."""
        state = self._restored
        self._restored = LogState()
        return state

    @property
    def pinned_rows(self) -> Int64:
        """[n] row numbers whose bytes must be kept, ascending, without repetition."""
        if self._pinned is None:
            rows = [draw.rows for draw in self._draws.values()]
            self._pinned = np.unique(np.concatenate(rows)) if rows else NO_ROWS
        return self._pinned

    @property
    def is_full(self) -> bool:
        """Whether it is time to `rotate`."""
        limit_bytes: int = max(self._rotate_bytes, SNAPSHOTS_PER_FILE * self._snapshot_bytes)
        return self._file.size_bytes >= limit_bytes

    def find(self, key: DrawKey) -> LoggedDraw | None:
        """The draw with this key, None where there was none since the newest checkpoint."""
        return self._draws.get(key)

    def append(self, *events: Event) -> None:
        """Write events that happen together: after a crash there are all of them or none.

        Raises:
            OSError: the disk refused; the log is as it was before.
        """
        self._file.append(encode_events(events, int(self._clock() * 1e6)))

    def append_draw(self, draw: LoggedDraw) -> None:
        """Write a draw of at least one row, before it is answered. A key that has one already gets more rows.

        Raises:
            OSError: see `append`.
        """
        self._append_numbers(draw.to_event())
        before = self._draws.get(draw.key)
        self._draws[draw.key] = draw if before is None else before.extended_by(draw)
        self._pinned = None

    def checkpointed(self, stage: str, step: int) -> None:
        """Release what a durable checkpoint of `stage` after `step` steps covers (see `log_state.release`).

        Raises:
            OSError: see `append`.
        """
        self._append_numbers(Event("checkpoint", stage=stage, step=step))
        self._draws = release(self._draws, stage, step)
        self._pinned = None

    def forget_unless(self, present: Callable[[Int64], bool]) -> bool:
        """Forget draws whose rows the store has lost, with a damaged segment or, where the settings do not guard
        against one, in a loss of power. True if there were any: the next `rotate` makes it last."""
        lost = [draw.key for draw in self._draws.values() if not present(draw.rows)]
        for key in lost:
            logger.warning("%s: the rows of %s are lost; on resume that step draws others", self._folder, key)
            del self._draws[key]
        self._pinned = None
        return bool(lost)

    def rotate(self, snapshot: LogSnapshot) -> None:
        """Begin a new file: history sealed, new file in place, then the old one goes.

        Raises:
            OSError: the disk refused; the log goes on in the file it had.
        """
        old = self._file
        self._seal_history(old.path)
        try:
            self._snapshot_bytes = self._begin_file(self._number + 1, snapshot)
        except OSError:
            sealed_log_path(self._folder, self._number).unlink()  # it would be taken for the file that still grows
            raise
        self._number += 1
        self._file = OpenSegment(open_log_path(self._folder, self._number), EVENT_SCHEMA, self._sync_each_record)
        old.delete()

    def prepare_sync(self) -> Callable[[], None]:
        """See `OpenSegment.prepare_sync`."""
        return self._file.prepare_sync()

    def sync(self) -> None:
        """Make every event durable.

        Raises:
            OSError: the disk refused.
        """
        if not self._sync_each_record:
            self.prepare_sync()()

    def close(self) -> None:
        """Make every event durable and let go of the file."""
        self._file.close()

    def _append_numbers(self, event: Event) -> None:
        """Write a draw or a checkpoint."""
        num_rows = None if event.rows is None else len(event.rows)
        record = self._record(event.kind, event.stage, event.source, num_rows)
        self._file.append_message(record.message(event, int(self._clock() * 1e6)))

    def _find_open_file(self) -> Path:
        """The file to go on with; what a crash in a rotation left behind is deleted."""
        for path in self._folder.glob("consumption-*.tmp"):
            path.unlink()
        files = sorted(self._folder.glob(f"consumption-*{OPEN_SUFFIX}"), key=log_number)
        if not files:
            if history := log_files(self._folder):
                newest = open_log_path(self._folder, max(history) + 1)
                raise CorruptSegmentError(
                    f"{newest} is missing: restore it from a copy; without it nobody knows which rows are live, so "
                    f"what remains is to move {self._folder} away and to begin with an empty buffer"
                )
            self._begin_file(1, LogSnapshot.empty())
            return open_log_path(self._folder, 1)
        *superseded, path = files
        for old in superseded:
            old.unlink()
        sealed_log_path(self._folder, log_number(path)).unlink(missing_ok=True)  # a copy of a file that still grows
        return path

    def _seal_history(self, path: Path) -> None:
        sealed = sealed_log_path(self._folder, self._number)
        temporary = sealed.with_name(sealed.name + ".tmp")
        temporary.unlink(missing_ok=True)
        file = OpenSegment(temporary, EVENT_SCHEMA, sync_each_batch=False)
        file.append(pa.concat_batches(read_log_file(path)))
        file.close()
        os.rename(temporary, sealed)
        sync_folder(self._folder)

    def _begin_file(self, number: int, snapshot: LogSnapshot) -> int:
        """Put the file `number` in place; gives the size of its first record."""
        path = open_log_path(self._folder, number)
        temporary = path.with_name(path.name + ".tmp")
        temporary.unlink(missing_ok=True)
        pinned = [draw.to_event(again=True) for draw in self._draws.values()]
        file = OpenSegment(temporary, EVENT_SCHEMA, sync_each_batch=False)
        record = encode_events([*snapshot.to_events(), *pinned], int(self._clock() * 1e6))
        file.append(record)
        file.close()
        os.rename(temporary, path)
        sync_folder(self._folder)
        size_bytes: int = record.nbytes
        return size_bytes


def _numbered_record(kind: EventKind, stage: str, source: str | None, num_rows: int | None) -> EventRecord:
    """For draws of so many rows; num_rows: None for checkpoints."""
    if num_rows is None:
        return EventRecord(Event(kind, stage=stage, step=0))
    rows = np.zeros(num_rows, dtype=np.int64)
    return EventRecord(Event(kind, stage=stage, step=0, source=source, policy_version=0, rows=rows, whole=0))
