"""The live rows of one source, oldest first, with what is remembered of each: 41 bytes a row, no ids."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from buffer.sampling.columns import BlockMinima, Column, Float64
from buffer.sampling.row_facts import Bool, Int32, Int64, RowFacts
from buffer.trajectory.staleness import NO_VERSION

Float32 = npt.NDArray[np.float32]

_FEWEST_GAPS = 1024
"""Removed rows leave gaps; up to this many are not worth closing."""

FIRST_PRIORITY = 1.0
"""Of a row that comes when no other is live. Priorities count relative to each other."""


class Drawn(NamedTuple):
    """The rows of a draw that are still live, with what is remembered of each.

    rows: [k]. times_sampled: [k] with this draw. oldest_version: [k] infinity where there is none. created_us: [k].
    """

    rows: Int64
    times_sampled: Int32
    oldest_version: Float64
    created_us: Float64


class LiveFacts:
    """Rows appended with ascending numbers and removed anywhere; to find few of them it does not look at all."""

    def __init__(self) -> None:
        self._row = Column(np.int64)
        self._is_live = Column(np.bool_)
        self._task = Column(np.int32)
        self._times_sampled = Column(np.int32)
        self._oldest_version = BlockMinima()
        self._created_us = BlockMinima()
        self._negative_priority = BlockMinima()
        self._task_codes: dict[str, int] = {}
        self._num_gaps = 0
        self._front = 0  # no row before this place is live

    def __len__(self) -> int:
        return len(self._row) - self._num_gaps

    @property
    def rows(self) -> Int64:
        """[n] numbers of the live rows, ascending (a copy)."""
        return self._row.values[self._is_live.values]

    @property
    def times_sampled(self) -> Int32:
        """[n] draws of each live row (a copy)."""
        return self._times_sampled.values[self._is_live.values]

    @property
    def priorities(self) -> Float32:
        """[n] of each live row (a copy)."""
        return -self._negative_priority.values[self._is_live.values].astype(np.float32)

    @property
    def largest_priority(self) -> float:
        """Largest priority of a live row; FIRST_PRIORITY where there is none."""
        return -self._negative_priority.smallest() if len(self) else FIRST_PRIORITY

    def append(self, facts: RowFacts, times_sampled: Int32, priorities: Float32) -> Int32:
        """Add rows with numbers above all before; gives [n] their `tasks`."""
        tasks = self._codes_of(facts.task)
        self._row.append(facts.row)
        self._is_live.append(np.ones(len(facts), dtype=np.bool_))
        self._task.append(tasks)
        self._times_sampled.append(times_sampled)
        oldest = facts.oldest_version
        self._oldest_version.append(np.where(oldest == NO_VERSION, np.inf, oldest))  # without one: never stale
        self._created_us.append(facts.created_us)
        self._negative_priority.append(-priorities)
        return tasks

    def remove(self, rows: Int64) -> None:
        """Take out these rows; all of them are live."""
        slots = self._slots(rows)
        self._is_live.values[slots] = False
        for column in (self._oldest_version, self._created_us, self._negative_priority):
            column.clear(slots)
        self._num_gaps += len(rows)
        if self._num_gaps > max(len(self), _FEWEST_GAPS):
            self._close_gaps()

    def is_live(self, rows: Int64) -> Bool:
        """[k] whether these rows are here and live."""
        return self._find(rows)[1]

    def tasks(self, rows: Int64) -> Int32:
        """[k] codes of the tasks of these live rows; a code has no meaning but that equal ones are the same task."""
        return self._task.values[self._slots(rows)]

    def count_draw(self, rows: Int64) -> Drawn:
        """Add a draw to each of these distinct rows, but for those that are not live."""
        slots, is_live = self._find(rows)
        if np.count_nonzero(is_live) < len(rows):
            rows, slots = rows[is_live], slots[is_live]
        times_sampled = self._times_sampled.values[slots] + 1
        self._times_sampled.values[slots] = times_sampled
        return Drawn(rows, times_sampled, self._oldest_version.values[slots], self._created_us.values[slots])

    def put_priorities(self, rows: Int64, priorities: Float32) -> None:
        """Replace the priorities of these distinct live rows."""
        self._negative_priority.put(self._slots(rows), -priorities)

    def oldest(self, count: int) -> Int64:
        """[count] the live rows that came first; count <= n."""
        ahead = self._is_live.values[self._front :]
        self._front += int(ahead.argmax())  # stops at the first live one
        width = count
        while np.count_nonzero(self._is_live.values[self._front : self._front + width]) < count:
            width *= 2
        window = slice(self._front, self._front + width)
        return self._row.values[window][self._is_live.values[window]][:count]

    def older_than(self, created_us: int) -> Int64:
        """[k] live rows created before."""
        return self._row.values[self._created_us.below(created_us)]

    def below_version(self, version: int) -> Int64:
        """[k] live rows that have an action of an older policy version."""
        return self._row.values[self._oldest_version.below(version)]

    def sampled_at_least(self, times: int) -> Int64:
        """[k] live rows that were drawn so often. Looks at all of them."""
        return self._row.values[self._is_live.values & (self._times_sampled.values >= times)]

    def _slots(self, rows: Int64) -> Int64:
        slots, is_live = self._find(rows)
        assert is_live.all(), "only live rows are looked up"
        return slots

    def _find(self, rows: Int64) -> tuple[Int64, Bool]:
        """[k] places of these rows, and [k] whether they are here and live; the place of a row that is not means
        nothing."""
        present = self._row.values
        if not len(present):
            return np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.bool_)
        last = len(present) - 1
        if present[last] - present[0] == last:  # numbers without a gap: this source is the only one
            slots = np.maximum(rows - present[0], 0)
        else:
            slots = np.searchsorted(present, rows)
        np.minimum(slots, last, out=slots)
        return slots, (present[slots] == rows) & self._is_live.values[slots]

    def _codes_of(self, tasks: pa.StringArray) -> Int32:
        if len(tasks) and tasks.equals(pa.repeat(tasks[0], len(tasks))):  # as actors send them
            code = self._task_codes.setdefault(tasks[0].as_py(), len(self._task_codes))
            return np.full(len(tasks), code, dtype=np.int32)
        encoded = tasks.dictionary_encode()
        codes = [self._task_codes.setdefault(name, len(self._task_codes)) for name in encoded.dictionary.to_pylist()]
        of_rows: Int32 = np.array(codes, dtype=np.int32)[encoded.indices.to_numpy()]
        return of_rows

    def _close_gaps(self) -> None:
        kept = np.flatnonzero(self._is_live.values)
        self._row.keep(kept)
        self._is_live.keep(kept)
        self._task.keep(kept)
        self._times_sampled.keep(kept)
        self._oldest_version.keep(kept)
        self._created_us.keep(kept)
        self._negative_priority.keep(kept)
        self._num_gaps = self._front = 0
