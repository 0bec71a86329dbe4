"""Compaction beside the work of the store, the archive, eviction by age, what is made durable when."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from buffer.settings import BufferSettings
from buffer.store import maintenance
from buffer.store.catalog import segment_path
from buffer.store.maintenance import SegmentUse, worth_rewriting
from buffer.store.shard import DrawKey
from buffer.store.store import ReplayStore
from tests.stores import SMALL, crash, events, live_ids, open_store, stored_rows
from tests.trajectories import BORN, CONTRACT, batch_of, expert_row, ids_of, numbered, row

KEY = DrawKey("stage", 0, "policy")


def sparse_store(folder: Path, **changes: object) -> ReplayStore:
    """Three sealed segments at least, in which few rows are live: those of the experts, and of one logged draw."""
    store = open_store(folder, capacity=20, segment_bytes=SMALL, **changes)
    store.insert(batch_of([expert_row("e0"), *(row(f"p{number}") for number in range(12))]))
    store.draw(KEY, 4, 0)
    for step in range(1, 12):
        store.insert(batch_of([expert_row(f"e{step}"), *(row(f"p{12 * step + number}") for number in range(12))]))
    assert store.status().sealed_segments >= 3
    return store


def upkeep_all(store: ReplayStore) -> int:
    """Rewrite until nothing is worth it; gives how often."""
    times = 0
    while (plan := store.maintenance.plan()) is not None:
        store.maintenance.finish(plan.run())
        times += 1
    return times


def test_compaction_keeps_what_is_live_or_pinned_and_disturbs_nobody(tmp_path):
    folder = tmp_path / "b"
    store = sparse_store(folder)
    drawn = store.draw(KEY, 4, 0)
    before = store.status()
    reader = {path: pa.memory_map(str(path)).read_buffer() for path in folder.glob("segment-*.arrows")}
    seen = {path: content.to_pybytes() for path, content in reader.items()}
    live = {source: live_ids(store, source) for source in ("policy", "expert")}
    assert upkeep_all(store) >= 1
    after = store.status()
    assert after.sealed_segments < before.sealed_segments
    assert after.size_bytes < before.size_bytes / 2
    assert len(list(folder.glob("segment-*.arrows"))) == after.sealed_segments + 1
    for each in (store, open_store(crash(folder, tmp_path / "c"), capacity=20, segment_bytes=SMALL)):
        assert {source: live_ids(each, source) for source in live} == live
        assert each.draw(KEY, 4, 0).batch.equals(drawn.batch)
        assert upkeep_all(each) == 0, "what was rewritten is left alone"
        each.close()
    gone = [path for path in reader if not path.exists()]
    assert gone
    assert all(reader[path].to_pybytes() == seen[path] for path in gone), "a reader keeps the files that it has mapped"


def test_the_store_works_on_while_a_rewriting_runs(tmp_path):
    folder = tmp_path / "b"
    store = sparse_store(folder)
    plan = store.maintenance.plan()
    assert store.maintenance.plan() is None, "one at a time"
    rewrite = plan.run()
    store.checkpointed("stage", 1)
    sealed = store.status().sealed_segments
    while store.status().sealed_segments <= sealed + 1:
        store.insert(batch_of([expert_row(f"f{store.next_row}"), *(row(f"q{store.next_row + n}") for n in range(5))]))
    assert store.draw(DrawKey("stage", 1, "expert"), 10, 0) is not None
    expected = {source: live_ids(store, source) for source in ("policy", "expert")}
    store.maintenance.finish(rewrite)
    for each in (store, open_store(crash(folder, tmp_path / "c"), capacity=20, segment_bytes=SMALL)):
        assert {source: live_ids(each, source) for source in expected} == expected
        rows = stored_rows(each._folder)
        assert rows == sorted(set(rows))
        each.close()


def test_a_rewriting_that_was_not_finished_leaves_nothing_behind(tmp_path):
    store = sparse_store(tmp_path / "b")
    expected = live_ids(store, "expert")
    rewrite = store.maintenance.plan().run()
    folder = crash(tmp_path / "b", tmp_path / "c")
    store.close()
    new = segment_path(folder, rewrite.plan.number)
    assert new.exists()
    store = open_store(folder, capacity=20, segment_bytes=SMALL)
    assert not new.exists()
    assert live_ids(store, "expert") == expected
    assert upkeep_all(store) >= 1
    store.close()


def archived(folder: Path) -> dict[int, str]:
    """Ids by row; each row stands there once."""
    found: dict[int, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            assert path.suffix == ".arrows"
            for each in pa.ipc.open_stream(path).read_all().to_pylist():
                assert each["row"] not in found
                found[each["row"]] = each["id"]
    return found


def test_rows_that_leave_the_disk_are_in_the_archive(tmp_path):
    folder = tmp_path / "run" / "buffer" / "shard-000"
    store = sparse_store(folder, archive=str(tmp_path / "archive"))
    assert upkeep_all(store) >= 1
    store.checkpointed("stage", 1)
    for step in range(20, 30):
        store.insert(batch_of([expert_row(f"e{step}"), *(row(f"p{12 * step + number}") for number in range(12))]))
        upkeep_all(store)
    found = archived(tmp_path / "archive")
    assert {
        path.parent.relative_to(tmp_path / "archive").as_posix() for path in (tmp_path / "archive").rglob("*.arrows")
    } == {"run/buffer/shard-000"}
    assert sorted([*stored_rows(folder), *found]) == list(range(store.next_row)), (
        "on disk or in the archive, never in both"
    )
    assert not {*live_ids(store), *live_ids(store, "expert")} & set(found.values())
    store.close()


def test_an_archive_that_cannot_be_reached_blocks_deletion_only(tmp_path, caplog, monkeypatch):
    (tmp_path / "archive").write_text("a file where a folder should be")
    folder = tmp_path / "run" / "buffer" / "shard-000"
    store = sparse_store(folder, archive=str(tmp_path / "archive"))
    store.checkpointed("stage", 1)
    monkeypatch.setattr(maintenance.time, "monotonic", lambda: now_s)
    now_s, pauses_s = 1000.0, []
    for attempt in range(10):
        plan = store.maintenance.plan()
        with pytest.raises(OSError, match=r"the archive did not take .*/archive/run/buffer/shard-000/segment-0000"):
            plan.run()
        try:
            plan.run()
        except OSError as error:
            store.maintenance.fail(error)
        began_s = now_s
        assert store.insert(numbered(10_000 + attempt, 1)).accepted == 1
        while store.maintenance.plan() is None:
            now_s += 0.5
        store.maintenance._is_rewriting = False
        pauses_s.append(now_s - began_s)
    assert pauses_s[:3] == [1.0, 2.0, 4.0]
    assert max(pauses_s) == 60.0
    assert stored_rows(folder) == list(range(store.next_row)), "nothing was deleted"
    assert "NotADirectoryError" in store.status().upkeep_error or "FileExistsError" in store.status().upkeep_error
    assert "nothing was deleted, and it is tried again in 60 s" in caplog.text
    (tmp_path / "archive").unlink()
    now_s += 60.0
    assert upkeep_all(store) >= 1
    assert store.status().upkeep_error is None
    assert sorted([*stored_rows(folder), *archived(tmp_path / "archive")]) == list(range(store.next_row))
    store.close()


def test_an_archive_that_is_none_is_refused(tmp_path):
    for _ in range(2):  # the first refusal let go of the folder
        with pytest.raises(ValueError, match=r"buffer\.archive=gopher://x: Protocol not known: gopher"):
            open_store(tmp_path / "b", archive="gopher://x")


@pytest.mark.parametrize(
    ("sizes", "live", "expected"),
    [
        ([100, 100, 100], [100, 100, 100], []),
        ([100, 100, 100], [100, 20, 100], [1]),
        ([100, 100, 100], [20, 100, 20], [0]),
        ([100, 100, 100, 100], [40, 40, 40, 100], [0, 1]),
        ([100, 10, 10, 100], [30, 100, 100, 60], [0, 1, 2]),
        ([100, 10, 10, 100], [100, 100, 100, 100], []),
        ([10, 10, 10, 10], [100, 100, 100, 100], [0, 1, 2, 3]),
    ],
)
def test_what_is_worth_rewriting(sizes, live, expected):
    """Neighbours that fit into one segment of 100 bytes; needed by less than half, or small."""
    segments = [
        SegmentUse(number, size, percent / 100) for number, (size, percent) in enumerate(zip(sizes, live, strict=True))
    ]
    assert worth_rewriting(segments, 0.5, 100) == expected


def test_an_insert_is_known_when_it_is_repeated_after_its_rows_were_removed(tmp_path):
    store = open_store(tmp_path / "b", segment_bytes=SMALL)
    first = numbered(0, 5)
    store.insert(first)
    for step in range(1, 20):
        store.insert(numbered(10 * step, 10))
    folder = crash(tmp_path / "b", tmp_path / "c")
    copy = open_store(folder, segment_bytes=SMALL)
    for each in (store, copy):
        result = each.insert(first)
        assert (result.accepted, result.present) == (0, 5)
    assert events(folder, "delete"), "also those whose segment is gone"
    copy.close()
    store.close()


def test_rows_that_are_too_old_are_evicted(tmp_path):
    now_s = BORN.timestamp() + 50.0
    store = ReplayStore(
        tmp_path / "b", CONTRACT, BufferSettings(min_size=1, max_age_s=100.0), seed=0, clock=lambda: now_s
    )
    late = BORN + timedelta(seconds=30)
    store.insert(batch_of([row("late", created_at=late), row("early"), expert_row("expert")]))
    now_s += 60.0
    assert ids_of(store.draw(KEY, 1, 0).batch) == ["late"]
    assert store.draw(DrawKey("stage", 1, "policy"), 2, 0) is None
    now_s += 30.0
    assert store.maintenance.plan() is None
    assert {source: each.removed for source, each in store.status().sources.items()} == {
        "policy": {"age": 2},
        "expert": {"age": 1},
    }
    store.close()


@pytest.mark.parametrize(("fsync", "per_insert", "draws"), [("batch", 1, 2), ("interval", 0, 1), ("none", 0, 1)])
def test_what_is_made_durable_when(tmp_path, monkeypatch, fsync, per_insert, draws):
    """An insert syncs its segment; SQLite syncs the commit of a draw by itself where it is told so (2 = FULL)."""
    synced = []
    fdatasync = os.fdatasync
    store = open_store(tmp_path / "b", fsync=fsync)

    def synchronous() -> int:
        return store._shard.catalog._connection.execute("pragma synchronous").fetchone()[0]

    monkeypatch.setattr(os, "fdatasync", lambda descriptor: synced.append(fdatasync(descriptor)))
    store.insert(numbered(0, 5))
    assert (len(synced), synchronous()) == (per_insert, 1), "the catalog is not synced for an insert"
    store.draw(KEY, 2, 0)
    assert (len(synced), synchronous()) == (per_insert, draws)
    synced.clear()
    store.prepare_sync()()
    assert len(synced) == 2, "segment and catalog"
    store.close()


def test_priorities_that_make_no_sense_are_refused(tmp_path):
    rows, ones = np.arange(3), np.ones(3, dtype=np.float32)
    store = open_store(tmp_path / "a")
    with pytest.raises(ValueError, match=r"no effect with buffer\.sampler=uniform"):
        store.update_priorities(rows, ones)
    store.close()
    store = open_store(tmp_path / "b", sampler="prioritised")
    store.insert(numbered(0, 3))
    for bad_rows, bad in ((rows, ones[:2]), (np.zeros(3, dtype=np.int64), ones)):
        with pytest.raises(ValueError, match="each row needs one"):
            store.update_priorities(bad_rows, bad)
    for value in (np.nan, -1.0, np.inf):
        with pytest.raises(ValueError, match="finite number, not negative"):
            store.update_priorities(rows, np.array([1.0, 1.0, value], dtype=np.float32))
    store.close()


def test_rows_of_sealed_segments_take_no_heap(tmp_path):
    store = open_store(tmp_path / "b", capacity=100_000, segment_bytes=50_000, fsync="none")
    batch_bytes, most = 0, 0
    for step in range(60):
        batch = numbered(50 * step, 50)
        store.insert(batch)
        batch_bytes += batch.nbytes
        most = max(most, store.status().sealed_segments)
        if most == 2:
            before = pa.total_allocated_bytes()
    assert most > 6
    assert pa.total_allocated_bytes() - before < 100_000 < batch_bytes / 4
    store.close()


def test_settings_that_have_no_effect_are_refused():
    with pytest.raises(ValueError, match="fsync_interval_s has no effect with fsync=batch"):
        BufferSettings(fsync_interval_s=0.5)
    assert BufferSettings(fsync="interval", fsync_interval_s=0.5).fsync_interval_s == 0.5
