"""What a replay store keeps per source: live rows, counters, and how rows cease to be live."""

from __future__ import annotations

from buffer.counters import DrawStatistics, SourceCounters
from buffer.live_rows import LiveRows
from buffer.staleness import stale_rows


class Lane:
    """The rows of one source.

    live_from: rows before this number were evicted. drawn, replayed: rows, each counted every time.
    """

    def __init__(self) -> None:
        self.live = LiveRows()
        self.inserted = 0
        self.dropped_stale = 0
        self.live_from = 0
        self.draws = 0
        self.drawn = 0
        self.replayed = 0
        self.last_draw: DrawStatistics | None = None

    def evict_beyond(self, capacity: int) -> list[str]:
        """Remove the oldest rows beyond `capacity`; gives their ids."""
        excess = len(self.live) - capacity
        if excess <= 0:
            return []
        self.live_from = int(self.live.rows[excess - 1]) + 1
        return self.live.evict_oldest(excess)

    def drop_stale(self, allowed: int) -> list[str]:
        """Remove policy rows with an action older than version `allowed`; gives their ids."""
        stale = stale_rows(self.live.oldest_versions, allowed)
        if not stale.any():
            return []
        self.dropped_stale += int(stale.sum())
        return self.live.drop(stale)

    def remove_dead(self, stale_before_row: int, stale_below: int) -> None:
        """Take out what was dropped or evicted in an earlier life of the store; it is counted already."""
        rows = self.live.rows
        stale = stale_rows(self.live.oldest_versions, stale_below) & (rows < stale_before_row)
        self.live.drop(stale | (rows < self.live_from))

    def counters(self) -> SourceCounters:
        """Counters of now."""
        return SourceCounters(
            inserted=self.inserted,
            live=len(self.live),
            evicted=self.inserted - len(self.live) - self.dropped_stale,
            dropped_stale=self.dropped_stale,
            drawn=self.drawn,
            replayed=self.replayed,
            last_draw=self.last_draw,
        )
