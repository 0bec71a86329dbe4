"""How rows cease to be live: the catalog says so first, with the reason, then they are gone from memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from buffer.settings import BufferSettings
from buffer.store.catalog import EventEntry, RemovalReason
from buffer.store.recovery import ShardState
from buffer.store.table import NO_ROWS
from buffer.trajectory.schema import SOURCES
from buffer.trajectory.staleness import stale_rows

Int64 = npt.NDArray[np.int64]


class Removals:
    """Finds the live rows of a shard that are to be removed, and removes them.

    What a loss of power takes of it is done again: the rows are judged anew. So no removal is synced by itself.
    """

    def __init__(self, settings: BufferSettings, shard: ShardState, clock: Callable[[], float]) -> None:
        """clock: seconds since the epoch."""
        self._settings = settings
        self._shard = shard
        self._clock = clock
        self._swept: tuple[int, ...] = ()  # what the last look for stale rows went by

    def evict(self) -> None:
        """Remove what the settings leave no place for.

        Raises:
            OSError: the disk refused; what is noted is removed, the rest is due the next time.
        """
        self._evict_aged()
        table = self._shard.table
        for source in SOURCES:
            if (excess := table.num_live(source) - self._settings.capacity) > 0:
                self._remove(source, "capacity", table.oldest(source, excess))

    def evict_oversampled(self) -> None:
        """After an opening: `max_times_sampled` may be lower than when the folder was written.

        Raises:
            OSError: see `evict`.
        """
        table = self._shard.table
        for source in SOURCES:
            rows = table.live_rows(source)
            self._remove(source, "sampled", self.exhausted(rows, table.times_sampled[table.slots(rows)]))

    def drop_stale(self) -> None:
        """Remove what must not be drawn; staleness counts from the newest version known.

        Raises:
            OSError: see `evict`.
        """
        self._evict_aged()
        shard, max_staleness = self._shard, self._settings.max_staleness
        state = (shard.newest_version, shard.first_version, shard.files.next_row)
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

    def event(self, source: str, reason: RemovalReason, rows: Int64) -> EventEntry:
        """What the catalog is to say of it."""
        version = self._shard.newest_version
        return EventEntry.new("remove", source=source, reason=reason, version=version, rows=rows)

    def forget(self, source: str, reason: RemovalReason, rows: Int64) -> None:
        """The catalog says it: these rows are gone from memory."""
        if len(rows):
            self._shard.table.remove(rows)
            self._shard.counts[source].removed[reason] += len(rows)

    def _evict_aged(self) -> None:
        if self._settings.max_age_s is None:
            return
        table, limit_us = self._shard.table, int((self._clock() - self._settings.max_age_s) * 1e6)
        for source in SOURCES:
            rows = table.live_rows(source)
            self._remove(source, "age", rows[table.created_us[table.slots(rows)] < limit_us])

    def _remove(self, source: str, reason: RemovalReason, rows: Int64) -> None:
        if len(rows):
            self._shard.catalog.commit([self.event(source, reason, rows)], self._shard.files.next_row, durable=False)
            self.forget(source, reason, rows)
