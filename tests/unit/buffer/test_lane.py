"""Lanes against a plain list of rows that does the same slowly, in random histories."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from buffer.sampling import columns, live_facts, ranked_rows, sum_tree, weighted_rows
from buffer.sampling.lane import Lane
from buffer.sampling.row_facts import RowFacts
from buffer.settings import BufferSettings
from buffer.trajectory.schema import with_rows
from buffer.trajectory.staleness import NO_VERSION
from tests.trajectories import batch_of, expert_row, row

SAMPLERS = ("uniform", "fifo", "recency", "prioritised", "stratified")
CAPACITY = 8
MAX_TIMES_SAMPLED = 3


def facts_of(rows, versions, created_us, tasks):
    return RowFacts(
        np.array(list(rows), dtype=np.int64),
        np.array(versions, dtype=np.int32),
        np.array(created_us, dtype=np.int64),
        pa.array(tasks, pa.string()),
    )


def facts_from(first, count, versions=(0,), tasks=("a",)):
    """Facts of `count` rows that alternate between versions and tasks."""
    rows = range(first, first + count)
    return facts_of(
        rows, [versions[r % len(versions)] for r in rows], list(rows), [tasks[r % len(tasks)] for r in rows]
    )


@dataclass
class Known:
    """One row of the model."""

    version: int
    created_us: int
    task: str
    times_sampled: int
    priority: float


class LaneHistories(RuleBasedStateMachine):
    """Insert, draw, prioritise, remove for every reason, and restore, with tiny blocks so that gaps close often."""

    @initialize(sampler=st.sampled_from(SAMPLERS))
    def open(self, sampler):
        self.settings = BufferSettings(
            capacity=CAPACITY, min_size=1, sampler=sampler, max_times_sampled=MAX_TIMES_SAMPLED
        )
        self.lane = Lane(self.settings)
        self.model: dict[int, Known] = {}
        self.next_row = 0
        self.seed = 0

    def largest_priority(self):
        return max((known.priority for known in self.model.values()), default=1.0)

    @rule(
        arrivals=st.lists(
            st.tuples(st.integers(0, 2), st.integers(NO_VERSION, 5), st.integers(0, 9), st.sampled_from("abc")),
            max_size=12,
        )
    )
    def append(self, arrivals):
        priority = self.largest_priority()
        new = {}
        for gap, version, created_us, task in arrivals:
            self.next_row += gap  # rows of the other source
            new[self.next_row] = Known(version, created_us, task, 0, priority)
            self.next_row += 1
        known = new.values()
        self.lane.append(
            facts_of(new, [k.version for k in known], [k.created_us for k in known], [k.task for k in known])
        )
        self.model |= new

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def draw(self, data):
        count = data.draw(st.integers(1, len(self.model)))
        self.seed += 1
        drawn = self.lane.sample(count, np.random.default_rng(self.seed)).tolist()
        assert len(drawn) == len(set(drawn)) == count
        assert set(drawn) <= self.model.keys()
        if self.settings.sampler == "fifo":
            assert drawn == sorted(self.model)[:count]
        for each in drawn:
            self.model[each].times_sampled += 1
        counted = self.lane.count_draw(np.array(drawn))
        versions = [self.model[each].version for each in counted.rows.tolist()]
        assert counted.oldest_version.tolist() == [np.inf if each == NO_VERSION else each for each in versions]
        assert counted.created_us.tolist() == [self.model[each].created_us for each in counted.rows.tolist()]
        exhausted = self.lane.exhausted(counted)
        expected = [each for each in drawn if self.model[each].times_sampled >= MAX_TIMES_SAMPLED]
        assert exhausted.tolist() == expected
        if data.draw(st.booleans(), label="removed at once"):
            self.remove(exhausted)

    @rule(numbers=st.sets(st.integers(0, 60), max_size=10), priority=st.floats(0.0, 100.0, width=32))
    def prioritise(self, numbers, priority):
        """Also rows that are gone or have never been."""
        priorities = {number: float(np.float32(priority + index)) for index, number in enumerate(numbers)}
        self.lane.update_priorities(
            np.array(list(numbers), dtype=np.int64), np.array(list(priorities.values()), dtype=np.float32)
        )
        for number in numbers & self.model.keys():
            self.model[number].priority = priorities[number]

    @rule()
    def evict_by_capacity(self):
        excess = max(len(self.model) - CAPACITY, 0)
        assert self.lane.over_capacity().tolist() == sorted(self.model)[:excess]
        self.remove(self.lane.over_capacity())

    @rule(version=st.integers(0, 6))
    def drop_stale(self, version):
        stale = [number for number, known in self.model.items() if NO_VERSION < known.version < version]
        assert self.lane.stale(version).tolist() == stale
        self.remove(self.lane.stale(version))

    @rule(created_us=st.integers(0, 9))
    def evict_by_age(self, created_us):
        old = [number for number, known in self.model.items() if known.created_us < created_us]
        assert self.lane.older_than(created_us).tolist() == old
        self.remove(self.lane.older_than(created_us))

    @rule()
    def restore(self):
        snapshot = self.lane.snapshot()
        by_priority = self.settings.sampler == "prioritised"
        assert (snapshot.priorities is not None) == by_priority
        known = self.model.values()
        restored = Lane(self.settings)
        restored.restore(
            snapshot,
            facts_of(self.model, [k.version for k in known], [k.created_us for k in known], [k.task for k in known]),
        )
        if self.model:
            count = 1 + len(self.model) // 2
            first, second = (lane.sample(count, np.random.default_rng(5)).tolist() for lane in (self.lane, restored))
            assert first == second
        over = [number for number, k in self.model.items() if k.times_sampled >= MAX_TIMES_SAMPLED]
        assert restored.over_sampled().tolist() == over
        self.lane = restored
        if not by_priority:
            for each in self.model.values():
                each.priority = 1.0

    @invariant()
    def as_the_model(self):
        if not hasattr(self, "lane"):
            return
        assert len(self.lane) == len(self.model)
        assert self.lane.rows.tolist() == list(self.model)
        snapshot = self.lane.snapshot()
        assert snapshot.times_sampled.tolist() == [known.times_sampled for known in self.model.values()]
        if snapshot.priorities is not None:
            assert snapshot.priorities.tolist() == [known.priority for known in self.model.values()]

    def remove(self, rows):
        self.lane.remove(rows)
        for each in rows.tolist():
            del self.model[each]


@pytest.fixture(autouse=True)
def _tiny_blocks(monkeypatch):
    monkeypatch.setattr(columns, "_BLOCK", 4)
    monkeypatch.setattr(sum_tree, "_FANOUT", 3)
    monkeypatch.setattr(live_facts, "_FEWEST_GAPS", 3)
    monkeypatch.setattr(weighted_rows, "_FEWEST_GAPS", 3)
    monkeypatch.setattr(ranked_rows, "_FEWEST_GAPS", 3)
    monkeypatch.setattr(ranked_rows, "_BLOCK", 4)


class TestLaneHistories(LaneHistories.TestCase):
    settings = settings(max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))


def test_facts_are_read_from_stored_rows():
    stored = with_rows(
        batch_of([row("a", [5, 6], policy_version=[4, 2]), expert_row("b")]), np.array([7, 9], dtype=np.int64)
    )
    facts = RowFacts.from_batch(stored)
    assert facts.row.tolist() == [7, 9]
    assert facts.oldest_version.tolist() == [2, NO_VERSION]
    assert facts.created_us.tolist() == stored.column("created_at").cast(pa.int64()).to_pylist()
    assert facts.task.to_pylist() == stored.column("task").to_pylist()
    own = facts.where(np.array([False, True]))
    assert (own.row.tolist(), own.task.to_pylist()) == ([9], stored.column("task").to_pylist()[1:])


def test_a_draw_of_an_earlier_life_counts_for_the_rows_that_are_still_live():
    lane = Lane(BufferSettings(max_times_sampled=2))
    lane.append(facts_from(0, 4))
    lane.count_draw(np.array([1, 2]))
    lane.remove(np.array([1]))
    assert lane.exhausted(lane.count_draw(np.array([1, 2, 3]))).tolist() == [2]
    assert lane.over_sampled().tolist() == [2]
    assert lane.snapshot().times_sampled.tolist() == [0, 2, 1]


def test_a_new_row_has_the_largest_priority_that_is_left():
    lane = Lane(BufferSettings(sampler="prioritised"))
    lane.append(facts_from(0, 3))
    lane.update_priorities(np.array([0, 1, 2]), np.array([5.0, 9.0, 2.0], dtype=np.float32))
    lane.append(facts_from(3, 1))
    lane.remove(np.array([1, 3]))
    lane.append(facts_from(4, 1))
    assert lane.snapshot().rows.tolist() == [0, 2, 4]
    assert lane.snapshot().priorities.tolist() == [5.0, 2.0, 5.0]
    lane.remove(lane.rows)
    lane.append(facts_from(5, 1))
    assert lane.snapshot().priorities.tolist() == [1.0]


def test_rows_that_nobody_has_judged_get_the_largest_priority_of_those_that_were():
    lane = Lane(BufferSettings(sampler="prioritised"))
    lane.append(facts_from(0, 4))
    lane.update_priorities(np.array([0, 1]), np.array([0.25, 0.5], dtype=np.float32))
    lane.restart_priorities(np.array([2, 3, 99]))
    assert lane.snapshot().priorities.tolist() == [0.25, 0.5, 0.5, 0.5]
    lane.restart_priorities(lane.rows)
    assert lane.snapshot().priorities.tolist() == [1.0, 1.0, 1.0, 1.0]
