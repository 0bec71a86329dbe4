"""Damaged segments: their batches are put aside and named, their rows accounted for, the others kept."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pytest

from buffer.store.shard import SampleKey
from tests.stores import SMALL, crash, events, live_ids, open_store, stored_rows
from tests.trajectories import batch_of, expert_row, ids_of, numbered, row

SEALED = "segment-000001.arrows"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """One sealed segment and a few rows after it; both sources; one row removed before."""
    folder = tmp_path_factory.mktemp("sound") / "b"
    store = open_store(folder, capacity=1000, segment_bytes=SMALL, max_times_sampled=1)
    while store.status().sealed_segments < 1:
        number = store.next_row
        store.insert(batch_of([row(f"p{number}"), expert_row(f"e{number}"), row(f"q{number}")]))
    store.sample(SampleKey("s", 0, "policy"), 1, 0)
    store.checkpointed("s", 1)
    store.insert(numbered(5000, 2))
    store.close()
    return folder


def reopened(folder: Path):
    return open_store(folder, capacity=1000, segment_bytes=SMALL, max_times_sampled=1)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "is damaged from byte": lambda path: path.write_bytes(path.read_bytes()[:1400] + bytes(path.stat().st_size - 1400)),
    "is damaged": lambda path: os.truncate(path, 1000),
    "is missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("reason", list(DAMAGE))
def test_a_segment_that_is_damaged_as_a_whole_is_put_aside(tmp_path, sound, caplog, reason):
    folder = crash(sound, tmp_path / "b")
    num_sealed = store_rows(folder) - 3
    DAMAGE[reason](folder / SEALED)
    damaged = (folder / SEALED).read_bytes() if (folder / SEALED).exists() else b""
    for again in range(2):
        store = reopened(folder)
        assert live_ids(store) >= {"5000", "5001", *(["9000"] if again else [])}
        (name,) = store.status().quarantined
        policy, expert = (store.status().sources[source] for source in ("policy", "expert"))
        assert policy.inserted + expert.inserted == store.next_row == num_sealed + 3 + again
        assert policy.removed["sampled"] == 1
        assert policy.removed["quarantine"] + expert.removed["quarantine"] + 1 >= num_sealed - 3
        for counters in (policy, expert):
            assert counters.inserted == counters.live + sum(counters.removed.values())
        assert store.insert(numbered(9000, 1)).accepted == 1 - again
        store.close()
    note = (folder / "quarantine" / f"{name}.txt").read_text()
    assert name.startswith(f"{SEALED}.")
    assert reason in note
    assert "rows (0 to " in note
    assert not (folder / SEALED).exists(), "nobody needs it any longer"
    start, end = map(int, name.rpartition(".")[2].split("-"))
    assert (folder / "quarantine" / name).read_bytes() == damaged[start:end]
    lost = [event for event in events(folder, "remove") if event.reason == "quarantine"]
    assert {event.source for event in lost} == {"policy", "expert"}
    assert {event.ids for event in events(folder, "delete") if event.seq <= lost[-1].seq + 2} == {None}


def store_rows(folder: Path) -> int:
    store = reopened(folder)
    store.close()
    return store.next_row


def test_a_crash_before_the_catalog_says_that_bytes_were_put_aside_changes_nothing(tmp_path, sound):
    folder = crash(sound, tmp_path / "b")
    (folder / SEALED).unlink()
    copy = crash(folder, tmp_path / "c")
    reopened(folder).close()
    (copy / "quarantine").mkdir()
    for path in (folder / "quarantine").iterdir():
        (copy / "quarantine" / path.name).write_bytes(path.read_bytes())
    store = reopened(copy)
    assert {"5000", "5001"} <= live_ids(store)
    (name, again) = store.status().quarantined
    assert again == f"{name}.2"
    store.close()


def open_with_three(folder: Path) -> tuple[Path, list[int]]:
    """A segment of three batches, and where they end."""
    store = open_store(folder)
    path = folder / SEALED
    sizes = []
    for first in (0, 3, 6):
        store.insert(numbered(first, 3))
        sizes.append(store.status().size_bytes)
    store.close()
    return path, sizes


def test_a_damaged_batch_costs_its_own_rows_only(tmp_path):
    path, sizes = open_with_three(tmp_path / "b")
    content = path.read_bytes()
    for at in range(sizes[0] + 4, sizes[1], 97):
        folder = crash(tmp_path / "b", tmp_path / f"at {at}")
        flip(folder / path.name, at)
        bad = (folder / path.name).read_bytes()
        for _ in range(2):
            store = open_store(folder)
            assert live_ids(store) == {"0", "1", "2", "6", "7", "8"}
            assert store.next_row == 9
            counters = store.status().sources["policy"]
            assert (counters.inserted, counters.live, counters.removed) == (9, 6, {"quarantine": 3})
            (name,) = store.status().quarantined
            store.close()
        assert name == f"{path.name}.{sizes[0]}-{sizes[1]}"
        assert (folder / "quarantine" / name).read_bytes() == bad[sizes[0] : sizes[1]]
        (lost,) = events(folder, "remove")
        assert (lost.row_numbers.tolist(), lost.source, lost.reason) == ([3, 4, 5], "policy", "quarantine")
        store = open_store(folder)
        assert store.insert(numbered(3, 3)).accepted == 3, "what is lost may come again"
        assert store.next_row == 12
        store.close()
        assert stored_rows(folder) == [0, 1, 2, *range(6, 12)]
    assert path.read_bytes() == content


def test_damage_in_the_last_batch_is_no_torn_write(tmp_path, caplog):
    path, sizes = open_with_three(tmp_path / "b")
    flip(path, sizes[2] - 100)
    for _ in range(2):
        store = open_store(tmp_path / "b")
        assert live_ids(store) == {str(number) for number in range(6)}
        assert (store.next_row, store.status().sources["policy"].removed) == (9, {"quarantine": 3})
        assert store.status().quarantined == (f"{path.name}.{sizes[1]}-{sizes[2]}",)
        store.close()
    assert "unfinished" not in caplog.text
    store = open_store(tmp_path / "b")
    store.insert(numbered(9, 3))
    store.close()
    store = open_store(tmp_path / "b")
    assert live_ids(store) == {*(str(number) for number in range(6)), "9", "10", "11"}
    store.close()


def test_a_damaged_header_costs_nothing(tmp_path, caplog):
    path, _ = open_with_three(tmp_path / "b")
    flip(path, 100)
    store = open_store(tmp_path / "b")
    assert live_ids(store) == {str(number) for number in range(9)}
    assert f"{path}: the schema at its start was damaged; it is written again" in caplog.text
    store.insert(numbered(9, 3))
    store.close()
    with path.open("rb") as file:
        batches = list(pa.ipc.open_stream(file))
    assert [id_ for batch in batches for id_ in ids_of(batch)] == [str(number) for number in range(12)]


def test_a_torn_write_is_cut_off_and_reported_wherever_it_is_torn(tmp_path, caplog):
    """Of the last of three batches, which the catalog does not name: the others are there, nothing is put aside."""
    store = open_store(tmp_path / "b")
    for first in (0, 3):
        store.insert(numbered(first, 3))
    begin, found = store.status().size_bytes, crash(tmp_path / "b", tmp_path / "found")
    store.insert(numbered(6, 3))
    end = store.status().size_bytes
    content = (tmp_path / "b" / SEALED).read_bytes()
    store.close()
    for size in sorted({*range(begin, end, 211), begin + 1, end - 1, end}):
        folder = crash(found, tmp_path / str(size))
        (folder / SEALED).write_bytes(content[:size].ljust(len(content), b"\0"))
        caplog.clear()
        store = open_store(folder)
        num_rows = 6 if any(content[size:end]) else 9
        is_torn = num_rows == 6 and size > begin
        assert ("bytes of an unfinished insert off its end" in caplog.text) == is_torn
        assert live_ids(store) == {str(number) for number in range(num_rows)}
        assert store.status().quarantined == ()
        assert store.insert(numbered(6, 3)).accepted == 9 - num_rows
        store.close()
