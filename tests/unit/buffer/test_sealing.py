"""A full segment is sealed in a thread: inserts and draws go on meanwhile, failures are told, deaths lose nothing."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from buffer.reading.audit import audit_buffer
from buffer.reading.audit_checks import DrawLimits
from buffer.reading.reader import read_shard
from buffer.store import sealing
from buffer.store.consumption_log import DrawKey
from buffer.store.replay_store import ReplayStore
from buffer.store.sealing import SealPlan
from tests.stores import SMALL, crash, live_ids, open_store, settle
from tests.trajectories import batch_of, expert_row, ids_of, numbered

OPEN = [f"segment-{number:06d}.arrows.open" for number in range(6)]
NO_LIMITS = DrawLimits(max_times_sampled=None, max_staleness=None)


class SlowDisk:
    """Seals wait for `gate`. errors: raised by the next seals, which write nothing; sealed: numbers of the others."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate = threading.Event()
        self.errors: list[OSError] = []
        self.sealed: list[int] = []
        run = SealPlan.run

        def slow(plan: SealPlan) -> sealing.Seal:
            assert self.gate.wait(30.0)
            if self.errors:
                raise self.errors.pop(0)
            self.sealed.append(plan.number)
            return run(plan)

        monkeypatch.setattr(SealPlan, "run", slow)


@pytest.fixture
def disk(monkeypatch):
    slow = SlowDisk(monkeypatch)
    yield slow
    slow.gate.set()  # or the thread outlives a test that failed


def shard(base: Path, **changes: object) -> tuple[Path, ReplayStore]:
    folder = base / "buffer" / "shard-000"
    return folder, open_store(folder, **{"capacity": 1000, "segment_bytes": SMALL, **changes})


def fill(store: ReplayStore, folder: Path) -> None:
    """Insert until the second segment holds rows, too."""
    while not (folder / OPEN[2]).exists():
        store.insert(numbered(store.next_row, 3))
    store.insert(numbered(store.next_row, 3))


def fill_both(store: ReplayStore) -> None:
    """Insert more than two segments hold."""
    for _ in range(20):
        store.insert(numbered(store.next_row, 3))


def test_inserts_and_draws_go_on_while_a_segment_is_sealed(tmp_path, disk):
    folder, store = shard(tmp_path)
    fill(store, folder)
    everything = {str(number) for number in range(store.next_row)}
    key = DrawKey("stage", 0, "policy")
    drawn = store.draw(key, store.next_row, 0)
    assert set(ids_of(drawn.batch)) == everything
    store.insert(batch_of([expert_row("e")]))
    size_bytes = sum(path.stat().st_size for path in folder.glob("segment-*"))
    assert (store.status().sealed_segments, store.status().size_bytes) == (0, size_bytes)
    snapshot = read_shard(folder)
    assert snapshot.stored.column("row").to_pylist() == list(range(store.next_row))
    assert audit_buffer(tmp_path / "buffer", NO_LIMITS).findings == ()
    copy = open_store(crash(folder, tmp_path / "dead"), capacity=1000, segment_bytes=SMALL)
    disk.gate.set()
    for each in (store, copy):
        settle(each)
        assert each.status().sealed_segments == 1
        assert live_ids(each) == everything
        assert live_ids(each, "expert") == {"e"}
        assert each.draw(key, drawn.batch.num_rows, 0).batch.equals(drawn.batch)
        assert each.insert(numbered(each.next_row, 1)).accepted == 1
        assert each.next_row == len(everything) + 2
        each.close()
    assert audit_buffer(tmp_path / "buffer", NO_LIMITS).findings == ()


def test_inserts_wait_when_the_next_segment_is_full_too(tmp_path, disk, monkeypatch):
    folder, store = shard(tmp_path)
    fill(store, folder)
    wait, waited = sealing.concurrent.futures.wait, []

    def opening_the_gate(futures, timeout):
        waited.append(store.next_row)
        disk.gate.set()
        return wait(futures, timeout)

    monkeypatch.setattr(sealing.concurrent.futures, "wait", opening_the_gate)
    while not waited:
        store.insert(numbered(store.next_row, 3))
    assert (folder / OPEN[2]).stat().st_size >= SMALL
    assert store.status().sealed_segments == 1
    assert [path.name for path in sorted(folder.glob("segment-*.open"))] == OPEN[2:4]
    store.close()
    assert disk.sealed == [1, 2]


def test_a_disk_that_hangs_is_named_and_nothing_is_lost(tmp_path, disk, monkeypatch):
    folder, store = shard(tmp_path)
    fill(store, folder)
    with monkeypatch.context() as patch:
        patch.setattr(sealing, "SEAL_TIMEOUT_S", 0.01)
        with pytest.raises(TimeoutError, match="the disk did not take a sealed segment within"):
            fill_both(store)
    rows = store.next_row
    disk.gate.set()
    settle(store)
    assert live_ids(store) == {str(number) for number in range(rows)}, "also those of the insert that was told"
    assert disk.sealed == [1, 2]
    store.close()


def test_a_seal_that_fails_is_told_once_and_done_again(tmp_path, disk):
    folder, store = shard(tmp_path)
    disk.errors = [OSError("no space left"), OSError("still none")]
    fill(store, folder)
    disk.gate.set()
    for message in ("no space left", "still none"):
        with pytest.raises(OSError, match=message):
            store._upkeep.finish_seal()
        assert store.insert(numbered(store.next_row, 1)).accepted == 1  # and begins the next attempt
    settle(store)
    assert store.status().sealed_segments == 1
    assert live_ids(store) == {str(number) for number in range(store.next_row)}
    store.close()


def test_a_close_waits_for_the_seal_and_survives_its_failure(tmp_path, disk, caplog):
    folder, store = shard(tmp_path)
    disk.errors = [OSError("no space left")]
    fill(store, folder)
    disk.gate.set()
    store.close()
    assert "no space left; the segment stays open" in caplog.text
    assert not list(folder.glob("*.arrows"))
    reopened = open_store(folder, capacity=1000, segment_bytes=SMALL)
    assert live_ids(reopened) == {str(number) for number in range(store.next_row)}
    reopened.close()
    assert [path.name for path in folder.glob("segment-*.arrows")] == ["segment-000001.arrows"]
    assert [path.name for path in folder.glob("segment-*.open")] == [OPEN[2]]


@pytest.mark.parametrize("torn", ["part of the first", "all of the first", "part of both"])
def test_a_loss_of_power_that_tears_a_full_segment_is_accounted_for(tmp_path, disk, torn):
    """Without syncs blocks may be missing anywhere, also before rows that are there."""
    folder, store = shard(tmp_path, fsync="none")
    fill(store, folder)
    rows = store.next_row
    found = crash(folder, tmp_path / "found" / "buffer" / "shard-000")
    disk.gate.set()
    store.close()
    first, second = found / OPEN[1], found / OPEN[2]
    os.truncate(first, 2_000 if torn == "all of the first" else first.stat().st_size - 10)
    lost = rows - 3 if torn == "all of the first" else 3
    if torn == "part of both":
        os.truncate(second, second.stat().st_size - 10)
        rows -= 6  # nobody knows any longer that they were there
        lost = 0
    for again in range(2):
        store = open_store(found, capacity=1000, segment_bytes=SMALL, fsync="none")
        assert store.next_row == rows + again
        assert (store.num_live("policy"), store.status().lost) == (rows - lost + again, lost)
        assert store.insert(numbered(5000 + again, 1)).accepted == 1
        store.close()
        assert audit_buffer(found.parent, NO_LIMITS).findings == ()
    numbers = [int(path.name.split("-")[1].split(".")[0]) for path in found.glob("segment-*")]
    assert len(set(numbers)) == len(numbers), "no number is given twice"
