"""Any history of inserts, draws, repeated draws, checkpoints and crashes against plain lists."""

from __future__ import annotations

import shutil
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from buffer.consumption_log import DrawKey
from tests.stores import crash, open_store
from tests.trajectories import batch_of, expert_row, ids_of, row


class StoreMachine(RuleBasedStateMachine):
    """The oracle is a list of (id, oldest version) per source, and the ids of every draw."""

    CAPACITY, STALENESS = 12, 2

    @initialize(folder=st.uuids())
    def begin(self, folder):
        self.root = Path(self.base) / str(folder)
        self.root.mkdir()
        self.generation = 0
        self.store = self.open(self.root / "0")
        self.live: dict[str, list[tuple[str, int]]] = {"policy": [], "expert": []}
        self.inserted = {"policy": 0, "expert": 0}
        self.dropped = {"policy": 0, "expert": 0}
        self.newest = -1
        self.next_id = 0
        self.next_step = 0
        self.drawn: dict[DrawKey, list[str]] = {}  # what no checkpoint covers

    def open(self, folder):
        return open_store(
            folder, capacity=self.CAPACITY, max_staleness=self.STALENESS, segment_bytes=5000, fsync="none"
        )

    @rule(counts=st.lists(st.tuples(st.sampled_from(["policy", "expert"]), st.integers(0, 6)), min_size=1, max_size=9))
    def insert(self, counts):
        rows = []
        for source, version in counts:
            id_ = str(self.next_id)
            self.next_id += 1
            if source == "policy":
                rows.append(row(id_, [5, 6], policy_version=[version, version + 1]))
                self.newest = max(self.newest, version + 1)
            else:
                rows.append(expert_row(id_))
            self.live[source].append((id_, version if source == "policy" else 10**6))
            self.inserted[source] += 1
        assert self.store.insert(batch_of(rows)).accepted == len(rows)
        for source in self.live:
            self.live[source] = self.live[source][-self.CAPACITY :]

    @rule(source=st.sampled_from(["policy", "expert"]), version=st.integers(0, 8), count=st.integers(1, CAPACITY))
    def draw(self, source, version, count):
        self.newest = max(self.newest, version)
        for name, rows in self.live.items():
            kept = [(id_, oldest) for id_, oldest in rows if self.newest - oldest <= self.STALENESS]
            self.dropped[name] += len(rows) - len(kept)
            self.live[name] = kept
        key = DrawKey("stage", self.next_step, source)
        result = self.store.draw(key, count, version)
        if len(self.live[source]) < count:
            assert result is None
        else:
            ids = ids_of(result.batch)
            assert len(set(ids)) == count
            assert set(ids) <= {id_ for id_, _ in self.live[source]}
            assert (result.policy_version, result.repeated) == (self.newest, False)
            self.next_step += 1
            self.drawn[key] = ids

    @precondition(lambda self: self.drawn)
    @rule(data=st.data())
    def repeat(self, data):
        """Whatever became of the rows meanwhile, and however new the weights are that the caller knows of."""
        key = data.draw(st.sampled_from(list(self.drawn)))
        result = self.store.draw(key, len(self.drawn[key]), 1000)
        assert result.repeated
        assert ids_of(result.batch) == self.drawn[key]

    @rule(back=st.integers(0, 3))
    def checkpoint(self, back):
        step = max(self.next_step - back, 0)
        self.store.checkpointed("stage", step)
        covered = [key for key in self.drawn if key.step < step]
        for key in covered:
            del self.drawn[key]
            assert not self.store.has_drawn(key)

    @precondition(lambda self: self.generation < 5)
    @rule(clean=st.booleans())
    def reopen(self, clean):
        folder = self.root / str(self.generation)
        self.generation += 1
        if clean:
            self.store.close()
            crash(folder, self.root / str(self.generation))
        else:
            crash(folder, self.root / str(self.generation))
            self.store.close()
        self.store = self.open(self.root / str(self.generation))

    @invariant()
    def counters_agree(self):
        if not hasattr(self, "store"):
            return
        status = self.store.status()
        assert self.store.newest_version == self.newest
        for source, counters in status.sources.items():
            assert counters.live == len(self.live[source])
            assert counters.inserted == self.inserted[source]
            assert counters.dropped_stale == self.dropped[source]
            assert counters.evicted == counters.inserted - counters.live - counters.dropped_stale
        assert all(self.store.has_drawn(key) for key in self.drawn)

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.root)


def test_any_history_with_crashes_matches_a_plain_list(tmp_path):
    class Machine(StoreMachine):
        base = tmp_path

    case = Machine.TestCase
    case.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
    case().runTest()
