"""Compaction beside the work of the store, the archive, eviction by age, what is made durable when."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from buffer.store import maintenance
from buffer.store.maintenance import SegmentUse, worth_rewriting
from buffer.store.shard import SampleKey
from buffer.store.store import ReplayStore
from tests.stores import SMALL, crash, live_ids, open_store, stored_rows
from tests.trajectories import batch_of, expert_row, numbered, row

KEY = SampleKey("stage", 0, "policy")


def sparse_store(folder: Path, **changes: object) -> ReplayStore:
    """Three sealed segments at least, in which few rows are live: those of the experts, and of one logged draw."""
    store = open_store(folder, capacity=20, segment_bytes=SMALL, **changes)
    store.insert(batch_of([expert_row("e0"), *(row(f"p{number}") for number in range(12))]))
    store.sample(KEY, 4, 0)
    for step in range(1, 12):
        store.insert(batch_of([expert_row(f"e{step}"), *(row(f"p{12 * step + number}") for number in range(12))]))
    assert store.status().sealed_segments >= 3
    return store


def maintenance_all(store: ReplayStore) -> int:
    """Rewrite until nothing is worth it; gives how often."""
    times = 0
    while (plan := store.maintenance.plan()) is not None:
        store.maintenance.finish(plan.run())
        times += 1
    return times


def test_compaction_keeps_what_is_live_or_pinned_and_disturbs_nobody(tmp_path):
    folder = tmp_path / "b"
    store = sparse_store(folder)
    drawn = store.sample(KEY, 4, 0)
    before = store.status()
    reader = {path: pa.memory_map(str(path)).read_buffer() for path in folder.glob("segment-*.arrows")}
    seen = {path: content.to_pybytes() for path, content in reader.items()}
    live = {source: live_ids(store, source) for source in ("policy", "expert")}
    assert maintenance_all(store) >= 1
    after = store.status()
    assert after.sealed_segments < before.sealed_segments
    assert after.size_bytes < before.size_bytes / 2
    assert len(list(folder.glob("segment-*.arrows"))) == after.sealed_segments + 1
    for each in (store, open_store(crash(folder, tmp_path / "c"), capacity=20, segment_bytes=SMALL)):
        assert {source: live_ids(each, source) for source in live} == live
        assert each.sample(KEY, 4, 0).batch.equals(drawn.batch)
        assert maintenance_all(each) == 0, "what was rewritten is left alone"
        each.close()
    gone = [path for path in reader if not path.exists()]
    assert gone
    assert all(reader[path].to_pybytes() == seen[path] for path in gone), "a reader keeps the files that it has mapped"


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
    assert (
        "NotADirectoryError" in store.status().maintenance_error
        or "FileExistsError" in store.status().maintenance_error
    )
    assert "nothing was deleted, and it is tried again in 60 s" in caplog.text
    (tmp_path / "archive").unlink()
    now_s += 60.0
    assert maintenance_all(store) >= 1
    assert store.status().maintenance_error is None
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
    """Neighbors that fit into one segment of 100 bytes; needed by less than half, or small."""
    segments = [
        SegmentUse(number, size, percent / 100) for number, (size, percent) in enumerate(zip(sizes, live, strict=True))
    ]
    assert worth_rewriting(segments, 0.5, 100) == expected


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
    store.sample(KEY, 2, 0)
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
    store = open_store(tmp_path / "b", sampler="prioritized")
    store.insert(numbered(0, 3))
    for bad_rows, bad in ((rows, ones[:2]), (np.zeros(3, dtype=np.int64), ones)):
        with pytest.raises(ValueError, match="give each row one"):
            store.update_priorities(bad_rows, bad)
    for value in (np.nan, -1.0, np.inf):
        with pytest.raises(ValueError, match="must be finite and not negative"):
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
