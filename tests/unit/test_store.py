"""The replay store against a plain list: capacity, staleness, draws, and the same state after every crash."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from buffer.manifest import CorruptSegmentError
from buffer.settings import BufferSettings
from buffer.store import ReplayStore
from tests.trajectories import BORN, CONTRACT, batch_of, expert_row, ids_of, numbered, policy_batch, row

SMALL = 8_000
"""segment_bytes that a few inserts fill."""


def generator(seed=0):
    return np.random.default_rng(seed)


def open_store(folder: Path, **changes: object) -> ReplayStore:
    return ReplayStore(folder, CONTRACT, BufferSettings(**{"capacity": 20, "min_size": 1, **changes}))


def live_ids(store: ReplayStore, source: str = "policy") -> set[str]:
    """All live rows, seen through a draw that takes everything."""
    count = store.num_live(source)
    if count == 0:
        return set()
    batch = store.draw(count, store.newest_version, generator(), source)
    assert batch is not None
    return set(ids_of(batch))


def crash(folder: Path, to: Path) -> Path:
    """The folder as it would be found if the process died now."""
    return Path(shutil.copytree(folder, to))


def test_rows_come_back_as_they_were_inserted(tmp_path):
    store = open_store(tmp_path / "b")
    batch = batch_of([row("a", [5, 1, 6]), expert_row("e", [5, 6, 1, 6, 2], realised=[None, 9, None, None, None])])
    assert store.insert(batch).accepted == 2
    assert store.draw(1, 0, generator()).equals(batch.slice(0, 1))
    assert store.draw(1, 0, generator(), "expert").equals(batch.slice(1, 1))
    assert store.draw(1, 0, generator()).schema.equals(batch.schema, check_metadata=True)
    store.close()


def test_draws_have_no_repetition_and_wait_for_enough(tmp_path):
    store = open_store(tmp_path / "b", min_size=10)
    store.insert(numbered(0, 9))
    assert store.draw(3, 0, generator()) is None, "min_size before the first draw"
    store.insert(numbered(9, 1))
    assert len(set(ids_of(store.draw(10, 0, generator())))) == 10
    assert store.draw(11, 0, generator()) is None
    with pytest.raises(ValueError, match=r"a draw of 21 trajectories can never be served: the buffer holds 20"):
        store.draw(21, 0, generator())
    with pytest.raises(ValueError, match="source 'critic' is none of expert, policy"):
        store.draw(1, 0, generator(), "critic")
    store.close()


def test_same_seed_same_samples(tmp_path):
    drawn = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        store = open_store(tmp_path / name, segment_bytes=SMALL, sampler="recency", recency_exponent=0.5)
        numbers = generator(seed)
        ids = []
        for step in range(12):
            store.insert(numbered(5 * step, 5))
            ids += ids_of(store.draw(4, 0, numbers))
        drawn.append(ids)
        store.close()
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_capacity_evicts_the_oldest_of_the_same_source(tmp_path):
    store = open_store(tmp_path / "b", capacity=10)
    store.insert(batch_of([expert_row(f"e{index}") for index in range(6)]))
    store.insert(numbered(0, 25))
    assert live_ids(store) == {str(number) for number in range(15, 25)}
    assert store.num_live("expert") == 6
    store.insert(batch_of([expert_row(f"f{index}") for index in range(6)]))
    assert live_ids(store, "expert") == {"e2", "e3", "e4", "e5", *(f"f{index}" for index in range(6))}
    counters = store.status().sources["policy"]
    assert (counters.inserted, counters.live, counters.evicted) == (25, 10, 15)
    store.close()


def test_no_drawn_row_is_too_stale_and_drops_are_for_good(tmp_path):
    store = open_store(tmp_path / "b", max_staleness=2)
    rows = [row(f"{low}-{high}", [5, 6], policy_version=[high, low]) for low in range(4) for high in range(low, 4)]
    store.insert(batch_of(rows))
    store.draw(1, 0, generator())
    assert live_ids(store) == {"1-1", "1-2", "1-3", "2-2", "2-3", "3-3"}, "version 3 was seen, so 0 is too old"
    assert set(ids_of(store.draw(3, 4, generator()))) == {"2-2", "2-3", "3-3"}
    counters = store.status().sources["policy"]
    assert (counters.live, counters.dropped_stale, counters.evicted) == (3, 7, 0)
    # A caller that knows less than the buffer does not bring rows back.
    store.insert(batch_of([row("late", [5], policy_version=[1])]))
    assert store.draw(4, 0, generator()) is None
    assert store.status().sources["policy"].dropped_stale == 8
    store.close()


def test_experts_are_never_stale(tmp_path):
    store = open_store(tmp_path / "b", max_staleness=0)
    store.insert(batch_of([expert_row("e")]))
    assert store.draw(1, 1000, generator(), "expert").num_rows == 1
    store.close()


def test_statistics_of_a_draw(tmp_path):
    now_s = BORN.timestamp() + 8.0
    store = ReplayStore(tmp_path / "b", CONTRACT, BufferSettings(min_size=1), clock=lambda: now_s)
    store.insert(batch_of([row("a", [5], policy_version=[1]), row("b", [5, 6], policy_version=[4, 6])]))
    store.draw(2, 7, generator())
    found = store.status().sources["policy"].last_draw
    assert (found.staleness_mean, found.staleness_max) == (4.5, 6)
    assert (found.age_mean_s, found.age_max_s) == (8.0, 8.0)
    store.close()


def test_rejections_name_rows_of_the_batch_as_sent(tmp_path):
    store = open_store(tmp_path / "b")
    store.insert(policy_batch(["a", "b"]))
    result = store.insert(batch_of([row("c", [99]), row("a"), row("d"), row("d"), row("b")]))
    assert result.accepted == 1
    assert [(rejection.row, rejection.id) for rejection in result.rejections] == [
        (0, "c"),
        (1, "a"),
        (3, "d"),
        (4, "b"),
    ]
    assert [rejection.reason for rejection in result.rejections][1::2] == [
        "id is in the buffer already",
        "id is in the buffer already",
    ]
    assert store.status().rejected == 4
    assert live_ids(store) == {"a", "b", "d"}
    store.close()


def test_an_insert_repeated_after_a_crash_is_stored_once(tmp_path):
    store = open_store(tmp_path / "b")
    store.insert(policy_batch(["a", "b"]))
    copy = open_store(crash(tmp_path / "b", tmp_path / "c"))
    assert copy.insert(policy_batch(["a", "b"])).accepted == 0
    assert copy.num_live("policy") == 2
    copy.close()
    store.close()


def test_full_segments_are_sealed_mapped_and_deleted_once_dead(tmp_path):
    folder = tmp_path / "b"
    store = open_store(folder, segment_bytes=SMALL)
    most = 0
    for step in range(60):
        store.insert(numbered(5 * step, 5))
        most = max(most, len(list(folder.glob("segment-*"))))
        assert store.draw(20 if step >= 3 else 5 * (step + 1), 0, generator()) is not None
    assert most <= 4
    status = store.status()
    assert status.sources["policy"].inserted == 300
    assert status.size_bytes < 5 * SMALL
    listed = {
        f"segment-{entry['number']:06d}.arrows"
        for entry in json.loads((folder / "manifest.json").read_text())["segments"]
    }
    assert {path.name for path in folder.glob("*.arrows")} == listed
    assert len(list(folder.glob("*.open"))) == 1
    store.close()


def test_a_drawn_batch_outlives_the_deletion_of_its_segment(tmp_path):
    store = open_store(tmp_path / "b", segment_bytes=SMALL)
    store.insert(numbered(0, 20))
    drawn = store.draw(20, 0, generator())
    before = drawn.to_pylist()
    for step in range(1, 20):
        store.insert(numbered(20 * step, 20))
    assert drawn.to_pylist() == before
    store.close()


def test_a_larger_capacity_brings_no_evicted_row_back(tmp_path):
    store = open_store(tmp_path / "b", capacity=10)
    store.insert(numbered(0, 25))
    folder = crash(tmp_path / "b", tmp_path / "c")
    store.close()
    for expected in (range(15, 30), range(15, 35)):
        store = open_store(folder, capacity=100)
        store.insert(numbered(expected[-1] - 4, 5))
        assert live_ids(store) == {str(number) for number in expected}
        # A crash: the next opening must know the new capacity, although nothing was sealed since.
        folder = crash(folder, tmp_path / f"d{expected[-1]}")
        store.close()
    store = open_store(folder, capacity=3)
    assert live_ids(store) == {"32", "33", "34"}
    store.close()


def test_stale_rows_stay_dropped_and_versions_never_go_back(tmp_path):
    store = open_store(tmp_path / "b", max_staleness=1)
    store.insert(numbered(0, 3, version=4))
    store.insert(numbered(3, 2, version=8))
    assert store.draw(2, 9, generator()) is not None
    store.draw(1, 10, generator())  # drops everything that was left
    copy = open_store(crash(tmp_path / "b", tmp_path / "c"), max_staleness=None)
    assert copy.newest_version == 10
    assert copy.num_live("policy") == 0
    assert copy.status().sources["policy"].dropped_stale == 5
    copy.close()
    store.close()


def test_rows_of_another_stage_are_not_drawn_not_even_those_that_come_in_late(tmp_path):
    store = open_store(tmp_path / "b", max_staleness=None)
    store.insert(numbered(0, 3, version=4))
    store.begin_stage(5)
    store.insert(numbered(3, 2, version=4))
    assert store.draw(1, 5, generator()) is None
    store.insert(numbered(5, 2, version=5))
    batch = store.draw(2, 5, generator())
    assert {versions[0] for versions in batch.column("policy_version").to_pylist()} == {5}
    copy = open_store(crash(tmp_path / "b", tmp_path / "c"), max_staleness=None)
    assert copy.num_live("policy") == 2
    copy.close()
    store.close()


@pytest.mark.parametrize("seals", [1, 2])
def test_a_crash_between_any_two_steps_of_sealing_loses_nothing(tmp_path, seals):
    """Sealing: sealed file in place, then manifest, then the open file goes. Each state is mixed from two folders."""
    after, before_insert = tmp_path / "after", tmp_path / "before insert"
    store = open_store(after, capacity=1000, segment_bytes=SMALL)
    inserted = 0
    while store.status().sealed_segments < seals:
        shutil.rmtree(before_insert, ignore_errors=True)
        crash(after, before_insert)
        inserted += 1
        store.insert(numbered(inserted, 1))
    store.close()
    # The same insert without the sealing: the state when sealing begins.
    store = open_store(before_insert, capacity=1000)
    store.insert(numbered(inserted, 1))
    before = crash(before_insert, tmp_path / "before sealing")
    store.close()
    names = (f"segment-{seals:06d}.arrows", f"segment-{seals:06d}.arrows.open")
    everything = {str(number) for number in range(1, inserted + 1)}
    states = {
        "temporary file": lambda folder: (folder / (names[0] + ".tmp")).write_bytes(b"half"),
        "sealed file in place": lambda folder: shutil.copy(after / names[0], folder),
        "manifest written": lambda folder: [
            shutil.copy(after / names[0], folder),
            shutil.copy(after / "manifest.json", folder),
        ],
        "open file gone": lambda folder: [
            shutil.copy(after / names[0], folder),
            shutil.copy(after / "manifest.json", folder),
            (folder / names[1]).unlink(),
        ],
    }
    for name, prepare in states.items():
        folder = crash(before, tmp_path / name)
        prepare(folder)
        store = open_store(folder, capacity=1000, segment_bytes=SMALL)
        assert live_ids(store) == everything, name
        store.insert(numbered(10_000, 1))
        assert "10000" in live_ids(store)
        assert not list(folder.glob("*.tmp"))
        store.close()


def test_a_torn_insert_is_cut_off_and_reported(tmp_path, caplog):
    store = open_store(tmp_path / "b")
    store.insert(numbered(0, 3))
    store.close()
    path = tmp_path / "b" / "segment-000001.arrows.open"
    with path.open("ab") as file:
        file.write(path.read_bytes()[1600:2000])
    store = open_store(tmp_path / "b")
    assert store.status().cut_bytes == 400
    assert "cut 400 bytes of an unfinished insert" in caplog.text
    assert live_ids(store) == {"0", "1", "2"}
    store.close()


def test_damaged_folders_are_errors_that_say_what_to_do(tmp_path):
    store = open_store(tmp_path / "b", capacity=1000, segment_bytes=SMALL)
    while store.status().sealed_segments < 1:
        store.insert(numbered(store.next_row, 10))
    store.close()

    def damaged(name, damage):
        folder = crash(tmp_path / "b", tmp_path / name)
        damage(folder)
        with pytest.raises(CorruptSegmentError) as caught:
            open_store(folder, capacity=1000)
        with pytest.raises(CorruptSegmentError):  # the first refusal let go of the folder
            open_store(folder, capacity=1000)
        return str(caught.value)

    segment = "segment-000001.arrows"

    def flip(folder):
        content = bytearray((folder / segment).read_bytes())
        content[5000] ^= 1
        (folder / segment).write_bytes(content)

    message = damaged("flip", flip)
    assert str(tmp_path / "flip" / segment) in message
    assert "restore it from a copy, or delete its entry from" in message
    assert "is missing" in damaged("missing", lambda folder: (folder / segment).unlink())
    assert "but no manifest.json" in damaged("no manifest", lambda folder: (folder / "manifest.json").unlink())
    assert "is damaged" in damaged("torn", lambda folder: os.truncate(folder / "manifest.json", 50))
    other = '{"format": 99}'
    assert "has format 99" in damaged("format", lambda folder: (folder / "manifest.json").write_text(other))
    assert "is damaged" in damaged("keys", lambda folder: (folder / "manifest.json").write_text('{"format": 1}'))


def test_the_remedy_for_a_lost_segment_works(tmp_path):
    store = open_store(tmp_path / "b", capacity=1000, segment_bytes=SMALL)
    while store.status().sealed_segments < 2:
        store.insert(numbered(store.next_row, 10))
    num_rows = store.next_row
    store.close()
    path = tmp_path / "b" / "manifest.json"
    manifest = json.loads(path.read_text())
    lost = manifest["segments"].pop(0)
    path.write_text(json.dumps(manifest))
    store = open_store(tmp_path / "b", capacity=1000, segment_bytes=SMALL)
    assert store.num_live("policy") == num_rows - lost["num_rows"]
    store.insert(numbered(5000, 1))
    store.close()


def test_one_process_at_a_time_and_one_contract(tmp_path):
    store = open_store(tmp_path / "b")
    with pytest.raises(ValueError, match="in use by another process"):
        open_store(tmp_path / "b")
    store.close()
    other = CONTRACT.__class__(32, 1, 2, "other")
    with pytest.raises(ValueError, match="another tokenizer"):
        ReplayStore(tmp_path / "b", other, BufferSettings())
    open_store(tmp_path / "b").close()


class StoreMachine(RuleBasedStateMachine):
    """Random inserts, draws and crashes; the oracle is a list of (id, oldest version) per source."""

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

    def open(self, folder):
        return open_store(
            folder, capacity=self.CAPACITY, max_staleness=self.STALENESS, segment_bytes=5000, fsync="seal"
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
        batch = self.store.draw(count, version, generator(self.next_id), source)
        if len(self.live[source]) < count:
            assert batch is None
        else:
            ids = ids_of(batch)
            assert len(set(ids)) == count
            assert set(ids) <= {id_ for id_, _ in self.live[source]}

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
