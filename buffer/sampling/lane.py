"""What a replay store keeps per source: which rows are live, how often each was drawn, and what a draw takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from buffer.sampling.live_facts import FIRST_PRIORITY, Drawn, Float32, LiveFacts
from buffer.sampling.row_facts import Bool, Int32, Int64, RowFacts
from buffer.sampling.samplers import make_sampler
from buffer.settings import BufferSettings

_NO_ROWS: Int64 = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class LaneSnapshot:
    """Live rows, ascending, and what cannot be read from them again.

    rows, times_sampled: [n]. priorities: [n], None unless the sampler goes by priorities.
    """

    rows: Int64
    times_sampled: Int32
    priorities: Float32 | None


class Lane:
    """The live rows of one source. It decides which rows a draw takes and which are to be removed; the store writes
    that down and then says so.
    """

    def __init__(self, settings: BufferSettings) -> None:
        self._settings = settings
        self._facts = LiveFacts()
        self._sampler = make_sampler(settings)

    def __len__(self) -> int:
        return len(self._facts)

    @property
    def rows(self) -> Int64:
        """[n] numbers of the live rows, ascending; a copy, so ask rarely."""
        return self._facts.rows

    def is_live(self, rows: Int64) -> Bool:
        """[k] whether these rows are live."""
        return self._facts.is_live(rows)

    def append(self, facts: RowFacts) -> None:
        """Rows become live, not drawn yet and with the largest priority present. facts: rows above all before."""
        priorities = np.full(len(facts), self._facts.largest_priority, dtype=np.float32)
        self._add(facts, np.zeros(len(facts), dtype=np.int32), priorities)

    def sample(self, count: int, generator: np.random.Generator) -> Int64:
        """[count] distinct live rows; 1 <= count <= len(self)."""
        assert 1 <= count <= len(self), "the store checks what is live before it draws"
        return self._sampler.sample(count, generator)

    def count_draw(self, rows: Int64) -> Drawn:
        """These distinct rows were drawn.

        Rows that are not live any more are ignored, so that draws of an earlier life can be counted.
        """
        return self._facts.count_draw(rows)

    def exhausted(self, drawn: Drawn) -> Int64:
        """The rows of a draw that reached `max_times_sampled`; they are live until they are removed."""
        limit = self._settings.max_times_sampled
        return _NO_ROWS if limit is None else drawn.rows[drawn.times_sampled >= limit]

    def over_capacity(self) -> Int64:
        """The oldest rows beyond the capacity."""
        excess = len(self) - self._settings.capacity
        return self._facts.oldest(excess) if excess > 0 else _NO_ROWS

    def older_than(self, created_us: int) -> Int64:
        """Rows created before this time, in microseconds since the epoch."""
        return self._facts.older_than(created_us)

    def stale(self, allowed: int) -> Int64:
        """Policy rows with an action older than version `allowed`."""
        return self._facts.below_version(allowed)

    def over_sampled(self) -> Int64:
        """Rows drawn `max_times_sampled` times or more. Looks at all rows: for a restart, where a draw may have been
        written down but not what followed, and the limit may be another.
        """
        limit = self._settings.max_times_sampled
        return _NO_ROWS if limit is None else self._facts.sampled_at_least(limit)

    def remove(self, rows: Int64) -> None:
        """These distinct live rows are no longer so."""
        if len(rows):
            self._sampler.remove(rows, self._facts.tasks(rows))
            self._facts.remove(rows)

    def update_priorities(self, rows: Int64, priorities: Float32) -> None:
        """Give distinct rows other priorities; those that are not live any more are ignored."""
        assert np.isfinite(priorities).all(), "a priority is a number"
        assert (priorities >= 0.0).all(), "a priority is not negative"
        live = self._facts.is_live(rows)
        rows, priorities = rows[live], priorities[live]
        self._facts.put_priorities(rows, priorities)
        self._sampler.update(rows, priorities)

    def restart_priorities(self, rows: Int64) -> None:
        """Give these rows, or those of them that are live, the largest priority of the others, as if they came now."""
        rows = rows[self._facts.is_live(rows)]
        self._facts.put_priorities(rows, np.zeros(len(rows), dtype=np.float32))
        largest = self._facts.largest_priority or FIRST_PRIORITY
        self.update_priorities(rows, np.full(len(rows), largest, dtype=np.float32))

    def snapshot(self) -> LaneSnapshot:
        """What `restore` needs besides the stored rows."""
        by_priority = self._settings.sampler == "prioritised"
        return LaneSnapshot(self.rows, self._facts.times_sampled, self._facts.priorities if by_priority else None)

    def restore(self, snapshot: LaneSnapshot, facts: RowFacts) -> None:
        """Become as the lane was that gave `snapshot`. facts: of its rows, in their order; this lane is empty."""
        assert not len(self), "a lane is restored once, before anything else"
        assert np.array_equal(snapshot.rows, facts.row), "the facts are those of the snapshot's rows"
        priorities = snapshot.priorities
        if priorities is None:
            priorities = np.full(len(facts), FIRST_PRIORITY, dtype=np.float32)
        self._add(facts, snapshot.times_sampled, priorities)

    def _add(self, facts: RowFacts, times_sampled: Int32, priorities: Float32) -> None:
        tasks = self._facts.append(facts, times_sampled, priorities)
        self._sampler.insert(facts.row, tasks, priorities)
