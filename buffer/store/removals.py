"""How rows cease to be live: the log says so first, then they are gone from memory."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from buffer.settings import BufferSettings
from buffer.store.events import Event, RemovalReason
from buffer.store.opening import ShardState
from buffer.store.row_numbers import NO_ROWS, Int64


class Removals:
    """Looks for rows that are to be removed, at no cost where there are none."""

    def __init__(self, settings: BufferSettings, shard: ShardState, clock: Callable[[], float] = time.time) -> None:
        """clock: seconds since the epoch."""
        self._settings = settings
        self._shard = shard
        self._clock = clock
        # A limit may be lower than when the folder was written, and a draw may have been noted without what followed.
        self._exhausted = {source: lane.over_sampled() for source, lane in shard.lanes.items()}

    def exhaust(self, source: str, rows: Int64) -> None:
        """These rows were drawn as often as they may be: the next step here removes them."""
        if len(rows):
            self._exhausted[source] = np.concatenate([self._exhausted[source], rows])

    def evict(self) -> None:
        """Remove what the settings leave no place for.

        Raises:
            OSError: the disk refused; what is noted is removed, the rest is due the next time.
        """
        self._remove_unfit()
        for source, lane in self._shard.lanes.items():
            self._remove(source, "capacity", lane.over_capacity())

    def drop_stale(self) -> None:
        """Remove what must not be drawn; staleness counts from the newest version known.

        Raises:
            OSError: see `evict`.
        """
        self._remove_unfit()
        shard, max_staleness = self._shard, self._settings.max_staleness
        for source, lane in shard.lanes.items():
            self._remove(source, "stage", lane.stale(shard.first_version))
            if max_staleness is not None:
                self._remove(source, "stale", lane.stale(shard.newest_version - max_staleness))

    def _remove_unfit(self) -> None:
        """Rows that are exhausted or too old."""
        for source, exhausted in self._exhausted.items():
            if len(exhausted):
                self._remove(source, "sampled", exhausted)
                self._exhausted[source] = NO_ROWS
        if self._settings.max_age_s is not None:
            for source, lane in self._shard.lanes.items():
                self._remove(source, "age", lane.older_than(int((self._clock() - self._settings.max_age_s) * 1e6)))

    def _remove(self, source: str, reason: RemovalReason, rows: Int64) -> None:
        if not len(rows):
            return
        shard = self._shard
        rows = np.sort(rows)
        ids = shard.files.ids(rows)
        version = shard.newest_version
        shard.log.append(Event("remove", source=source, policy_version=version, reason=reason, rows=rows, ids=ids))
        shard.lanes[source].remove(rows)
        shard.tallies[source].removed[reason] += len(rows)
        shard.known.remove(ids, rows)
        shard.files.lose(rows)
