"""What leaves a shard: rows that cease to be live, and segments that nobody needs or that are worth a rewriting."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from buffer.settings import BufferSettings
from buffer.store.catalog import FACTS, Deletion, EventEntry, RemovalReason, SegmentEntry
from buffer.store.compaction import Archive, Rewrite, RewritePlan, SegmentUse, worth_rewriting
from buffer.store.shard import Shard
from buffer.store.table import NO_ROWS, NOT_STORED
from buffer.trajectory.schema import SOURCES
from buffer.trajectory.staleness import stale_rows

Int64 = npt.NDArray[np.int64]

FIRST_RETRY_S = 1.0
LONGEST_RETRY_S = 60.0
"""Pauses after a rewriting that failed, each twice as long as the one before."""

logger = logging.getLogger(__name__)


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
        """Remove what must not be drawn; staleness counts from the newest version known."""
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

    def exhausted(self, rows: Int64, times_sampled: npt.NDArray[np.int32]) -> Int64:
        """[k] those of these rows that were drawn `max_times_sampled` times or more, ascending."""
        limit = self._settings.max_times_sampled
        return NO_ROWS if limit is None else np.sort(rows[times_sampled >= limit])

    def removal(self, source: str, reason: RemovalReason, rows: Int64) -> list[EventEntry]:
        """The event of a removal; none where there are no rows."""
        version = self._shard.newest_version
        event = EventEntry("remove", source=source, reason=reason, version=version, rows=rows.tobytes())
        return [event] if len(rows) else []

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
        """Sealed segments of which no row is live or pinned."""
        shard, table = self._shard, self._shard.table
        sealed = (each for each in shard.segments.stored.values() if each.size is not None)
        dead = [each.number for each in sealed if not table.live_in[each.number]]
        if not dead:
            return []
        pinned = set(table.segment[table.slots(shard.draws.pinned_rows)].tolist())
        return [number for number in dead if number not in pinned]

    def _sparse(self) -> list[int]:
        """Sealed segments that are worth a rewriting."""
        shard, table = self._shard, self._shard.table
        pinned = shard.draws.pinned_rows
        dead = pinned[~table.is_live(pinned)]
        num_pinned = Counter(table.segment[table.slots(dead)].tolist())
        uses = [
            SegmentUse(
                number=each.number,
                size=each.size,
                num_rows=sum(message.num_rows for message in each.messages),
                num_needed=table.live_in[each.number] + num_pinned[each.number],
            )
            for each in sorted(shard.segments.stored.values(), key=lambda each: each.messages[:1])
            if each.size is not None
        ]
        return worth_rewriting(uses, self._settings.compact_below, shard.segments.room)

    def _plan(self, numbers: Sequence[int]) -> RewritePlan:
        table, segments, pinned = self._shard.table, self._shard.segments, self._shard.draws.pinned_rows
        is_kept = table.live[table.filled].copy()
        is_kept[table.slots(pinned)] = True
        is_kept &= np.isin(table.segment[table.filled], numbers)
        messages = {each: (segments.maps.content(each), tuple(segments.stored[each].messages)) for each in numbers}
        kept_rows = np.flatnonzero(is_kept) + table.base
        return RewritePlan(segments.folder, segments.schema, messages, kept_rows, segments.take_number(), self._archive)

    def _replace(self, rewrite: Rewrite) -> None:
        """Put a rewriting in the place of its segments."""
        shard, table, old, new = self._shard, self._shard.table, list(rewrite.plan.messages), rewrite.plan.number
        firsts = [message.first_row for _, messages in rewrite.plan.messages.values() for message in messages]
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
        """What the catalog holds of stored rows."""
        facts = np.empty(len(rows), FACTS)
        for name in FACTS.names or ():
            facts[name] = getattr(self._shard.table, name)[self._shard.table.slots(rows)]
        return facts.tobytes()
