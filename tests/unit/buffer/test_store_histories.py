"""Any history of inserts, draws, checkpoints, maintenance, crashes and new settings against a slow model of plain
dicts."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from buffer.reading.audit import SampleLimits, audit_buffer
from buffer.settings import BufferSettings
from buffer.store.shard import SampleKey
from buffer.store.store import ReplayStore
from tests.stores import crash, events, stored_rows
from tests.trajectories import BORN, CONTRACT, batch_of, expert_row, ids_of, row

SOURCES = ("policy", "expert")


@dataclass
class ModelRow:
    """fate: `live`, or the reason of the removal."""

    id: str
    source: str
    version: int
    born_s: float
    fate: str = "live"
    times_sampled: int = 0


class StoreMachine(RuleBasedStateMachine):
    """Every row that was ever inserted, in order, and what becomes of it."""

    base: Path

    @initialize(folder=st.uuids(), archive=st.booleans())
    def begin(self, folder, archive):
        self.root = self.base / str(folder)
        shutil.rmtree(self.root, ignore_errors=True)  # of a failure that is run again
        self.root.mkdir()
        self.folder = self.root / "buffer" / "shard-000"
        self.num_crashes = 0
        self.now_s = BORN.timestamp()
        self.capacity, self.max_times = 12, None
        self.archive = self.root / "archive" if archive else None
        self.store = self.open()
        self.rows: list[ModelRow] = []
        self.newest = -1
        self.first_version = 0
        self.next_step = 0
        self.num_samples = Counter()
        self.num_sampled = Counter()
        self.drawn: dict[SampleKey, list[int]] = {}  # rows of what no checkpoint covers
        self.whole: dict[SampleKey, int] = {}
        self.rewrite = None
        self.was_interrupted = False  # with a rewriting that the archive knows of already

    def open(self) -> ReplayStore:
        changes = BufferSettings(
            capacity=self.capacity,
            min_size=1,
            max_staleness=2,
            max_times_sampled=self.max_times,
            max_age_s=100.0,
            segment_bytes=6_000,
            compaction_threshold=0.7,
            fsync="none",
            archive=None if self.archive is None else str(self.archive),
        )
        return ReplayStore(self.folder, CONTRACT, changes, seed=0, clock=lambda: self.now_s)

    # The model

    def live(self, source: str) -> list[ModelRow]:
        return [each for each in self.rows if each.source == source and each.fate == "live"]

    def remove_unfit(self) -> None:
        for each in self.rows:
            if each.fate == "live":
                if self.max_times is not None and each.times_sampled >= self.max_times:
                    each.fate = "sampled"
                elif each.born_s < self.now_s - 100.0:
                    each.fate = "age"

    def evict(self) -> None:
        self.remove_unfit()
        for source in SOURCES:
            for each in self.live(source)[: -self.capacity]:
                each.fate = "capacity"

    def drop_stale(self, version: int) -> None:
        self.newest = max(self.newest, version)
        self.remove_unfit()
        for each in self.live("policy"):
            if each.version < self.first_version:
                each.fate = "stage"
            elif each.version < self.newest - 2:
                each.fate = "stale"

    # What happens

    @rule(
        counts=st.lists(st.tuples(st.sampled_from(SOURCES), st.integers(0, 6), st.integers(0, 60)), max_size=9),
        again=st.integers(0, 2),
    )
    def insert(self, counts, again):
        rows = []
        for source, version, age_s in counts:
            id_ = f"id {len(self.rows)}"
            born_s = self.now_s - age_s
            born = BORN + timedelta(seconds=born_s - BORN.timestamp())
            if source == "policy":
                rows.append(row(id_, [5, 6], policy_version=[version, version + 1], created_at=born))
                self.newest = max(self.newest, version + 1)
            else:
                rows.append(expert_row(id_, created_at=born))
            self.rows.append(ModelRow(id_, source, version, born_s))
        repeated = [expert_row(each.id) for each in self.rows[: len(self.rows) - len(rows)][-again:]] if again else []
        result = self.store.insert(batch_of([*repeated, *rows]))
        assert (result.accepted, result.present) == (len(rows), len(repeated))
        assert result.rejections == ()
        self.evict()

    @rule(source=st.sampled_from(SOURCES), version=st.integers(0, 8), count=st.integers(1, 12))
    def sample(self, source, version, count):
        if count > self.capacity:
            return
        key = SampleKey("stage", self.next_step, source)
        result = self.store.sample(key, count, version)
        self.drop_stale(version)
        assert (result is None) == (len(self.live(source)) < count)
        if result is not None:
            assert (result.policy_version, result.repeated) == (self.newest, False)
            self.next_step += 1
            self.num_samples[source] += 1
            self.drawn[key], self.whole[key] = [], count
            self.check(key, result, count)

    def check(self, key, result, count):
        rows = result.rows.tolist()
        assert ids_of(result.batch) == [self.rows[number].id for number in rows]
        assert len(set(rows)) == len(rows) == count
        before = self.drawn[key]
        assert rows[: len(before)] == before
        for number in rows[len(before) :]:
            assert (self.rows[number].fate, self.rows[number].source) == ("live", key.source)
            self.rows[number].times_sampled += 1
        self.num_sampled[key.source] += len(rows) - len(before)
        self.drawn[key] = rows
        self.evict()

    @precondition(lambda self: self.drawn)
    @rule(data=st.data())
    def repeat(self, data):
        """Whatever became of the rows meanwhile, and however new the weights are that the caller knows of."""
        key = data.draw(st.sampled_from(list(self.drawn)))
        rows = self.drawn[key]
        if len(rows) <= self.capacity:
            result = self.store.sample(key, len(rows), 1000, self.whole[key])
            assert result.repeated
            assert result.rows.tolist() == rows
            assert ids_of(result.batch) == [self.rows[number].id for number in rows]

    @rule(source=st.sampled_from(SOURCES), parts=st.lists(st.integers(1, 4), min_size=2, max_size=3))
    def draw_in_parts(self, source, parts):
        key, count = SampleKey("stage", self.next_step, source), 0
        for part in parts:
            count += part
            if count > self.capacity:
                break
            result = self.store.sample(key, count, 0, whole=20)
            self.drop_stale(0)
            already = self.drawn.get(key, [])
            available = sum(number not in already for number, each in enumerate(self.rows) if each in self.live(source))
            assert (result is None) == (available < part)
            if result is None:
                break
            if not already:
                self.next_step += 1
                self.num_samples[source] += 1
                self.drawn[key], self.whole[key] = [], 20
            self.check(key, result, count)

    @rule(back=st.integers(0, 3))
    def checkpoint(self, back):
        step = max(self.next_step - back, 0)
        self.store.checkpointed("stage", step)
        for key in [key for key in self.drawn if key.step < step]:
            del self.drawn[key]
            assert self.store.num_logged(key) == 0

    @rule(version=st.integers(0, 5))
    def begin_stage(self, version):
        self.store.begin_stage(version)
        self.first_version = version

    @rule(seconds=st.integers(1, 60))
    def wait(self, seconds):
        self.now_s += seconds

    @rule()
    def plan_maintenance(self):
        plan = self.store.maintenance.plan()
        self.evict()
        if plan is not None:
            assert self.rewrite is None
            self.rewrite = plan.run()

    @precondition(lambda self: self.rewrite is not None)
    @rule()
    def finish_maintenance(self):
        self.store.maintenance.finish(self.rewrite)
        self.rewrite = None

    @precondition(lambda self: self.num_crashes < 6)
    @rule(clean=st.booleans(), capacity=st.sampled_from([6, 12, 30]), max_times=st.sampled_from([None, 1, 3]))
    def reopen(self, clean, capacity, max_times):
        self.num_crashes += 1
        found = self.root / "found"
        if clean:
            self.store.close()
            crash(self.folder, found)
        else:
            crash(self.folder, found)
            self.store.close()
        shutil.rmtree(self.folder)
        found.rename(self.folder)
        self.was_interrupted |= self.rewrite is not None
        self.capacity, self.max_times, self.rewrite = capacity, max_times, None
        self.store = self.open()
        self.evict()

    @rule()
    def audit(self):
        found = audit_buffer(self.folder.parent, SampleLimits(max_times_sampled=None, max_staleness=2))
        assert found.findings == ()
        assert all(each.inserted == each.live + sum(each.removed.values()) for each in found.accounts)

    # What always holds

    @invariant()
    def counters_agree(self):
        status = self.store.status()
        assert (self.store.newest_version, self.store.next_row) == (self.newest, len(self.rows))
        assert (status.rejected, status.quarantined) == (0, ())
        for source, counters in status.sources.items():
            own = [each for each in self.rows if each.source == source]
            fates = Counter(each.fate for each in own)
            assert counters.live == fates.pop("live", 0)
            assert counters.removed == fates
            assert counters.inserted == len(own) == counters.live + sum(counters.removed.values())
            assert (counters.sample_calls, counters.sampled) == (self.num_samples[source], self.num_sampled[source])
        assert all(self.store.num_logged(key) for key in self.drawn)

    @invariant()
    def rows_agree(self):
        table = self.store._shard.table
        for source in SOURCES:
            rows = table.live_rows(source)
            expected = [number for number, each in enumerate(self.rows) if each in self.live(source)]
            assert rows.tolist() == expected
            assert table.times_sampled[table.slots(rows)].tolist() == [self.rows[row].times_sampled for row in expected]

    @invariant()
    def the_catalog_accounts_for_every_row(self):
        found = events(self.folder)
        removed = {
            number: (event.reason, event.source)
            for event in found
            if event.kind == "remove"
            for number in event.row_numbers.tolist()
        }
        gone = {number: each for number, each in enumerate(self.rows) if each.fate != "live"}
        assert removed == {number: (each.fate, each.source) for number, each in gone.items()}
        assert sum(len(event.row_numbers) for event in found if event.kind == "remove") == len(removed)
        deleted = {
            number: (event.source, id_)
            for event in found
            if event.kind == "delete"
            for number, id_ in zip(event.row_numbers.tolist(), json.loads(event.ids), strict=True)
        }
        assert deleted == {number: (self.rows[number].source, self.rows[number].id) for number in deleted}
        assert sorted([*deleted, *stored_rows(self.folder)]) == list(range(len(self.rows)))
        drawn = Counter(number for event in found if event.kind == "draw" for number in event.row_numbers.tolist())
        assert drawn == {number: each.times_sampled for number, each in enumerate(self.rows) if each.times_sampled}

    @invariant()
    def every_row_is_on_disk_or_in_the_archive(self):
        files = list(self.folder.glob("segment-*"))
        assert len(files) == self.store.status().sealed_segments + 1 + (
            self.rewrite is not None and bool(self.rewrite.written)
        )
        stored = stored_rows(self.folder)
        needed = {number for number, each in enumerate(self.rows) if each.fate == "live"}
        assert needed | {number for rows in self.drawn.values() for number in rows} <= set(stored)
        if self.archive is not None:
            archived = self.archived_rows()
            assert len(set(archived)) == len(archived), "each row stands there once"
            assert all(self.rows[number].fate != "live" for number in archived)
            assert {*stored, *archived} == set(range(len(self.rows)))
            if self.rewrite is None and not self.was_interrupted:
                assert not set(stored) & set(archived)

    def archived_rows(self) -> list[int]:
        rows: list[int] = []
        for path in self.archive.glob(f"{self.root.name}/buffer/shard-000/*.arrows"):
            table = pa.ipc.open_stream(path).read_all()
            rows += table.column("row").to_pylist()
            assert table.column("id").to_pylist() == [self.rows[number].id for number in rows[-table.num_rows :]]
        return rows

    def teardown(self):
        if hasattr(self, "store"):
            self.audit()
            self.store.close()
            shutil.rmtree(self.root)


def test_any_history_matches_the_model(tmp_path):
    class Machine(StoreMachine):
        base = tmp_path

    case = Machine.TestCase
    case.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
    case().runTest()
