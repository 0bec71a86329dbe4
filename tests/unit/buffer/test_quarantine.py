"""Damaged segments: put aside and named, their rows accounted for, the others kept, the store goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest

from buffer.store.consumption_log import DrawKey
from buffer.store.event_history import read_events
from buffer.store.segments import scan_open
from tests.stores import SMALL, crash, live_ids, open_store, settle
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
        settle(store)
    store.draw(DrawKey("s", 0, "policy"), 1, 0)
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
    "has checksum": lambda path: flip(path, path.stat().st_size // 2),
    "bytes instead of": lambda path: os.truncate(path, 3000),
    "is missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("reason", list(DAMAGE))
def test_a_damaged_sealed_segment_is_put_aside(tmp_path, sound, caplog, reason):
    folder = crash(sound, tmp_path / "b")
    (entry,) = json.loads((folder / "manifest.json").read_text())["segments"]
    DAMAGE[reason](folder / SEALED)
    damaged = (folder / SEALED).read_bytes() if (folder / SEALED).exists() else None
    for again in range(2):
        store = reopened(folder)
        assert live_ids(store) == {"5000", "5001", *(["9000"] if again else [])}
        assert store.status().quarantined == (SEALED,)
        policy, expert = (store.status().sources[source] for source in ("policy", "expert"))
        assert policy.inserted + expert.inserted == store.next_row == entry["num_rows"] + 2 + again
        assert (policy.live, policy.removed) == (2 + again, {"quarantine": policy.inserted - 3 - again, "sampled": 1})
        assert (expert.live, expert.removed) == (0, {"quarantine": expert.inserted})
        assert store.insert(numbered(9000, 1)).accepted == 1 - again
        store.close()
    note = (folder / "quarantine" / f"{SEALED}.txt").read_text()
    assert reason in note
    assert f"{entry['num_rows']} rows (0 to {entry['num_rows'] - 1})" in note
    assert note.strip() in caplog.text
    assert not (folder / SEALED).exists()
    if damaged is not None:
        assert (folder / "quarantine" / SEALED).read_bytes() == damaged
    lost = [event for event in read_events(folder).to_pylist() if event["reason"] == "quarantine"]
    assert {event["source"] for event in lost} == {"policy", "expert"}, "the log knows the sources of sealed rows"
    assert {id_ for event in lost for id_ in event["ids"]} == {None}


def test_a_crash_after_a_segment_was_put_aside_changes_nothing(tmp_path, sound):
    """The file is gone already, and neither manifest nor log say so."""
    folder = crash(sound, tmp_path / "b")
    (folder / "quarantine").mkdir()
    (folder / "quarantine" / f"{SEALED}.txt").write_text("damaged\n")
    (folder / SEALED).rename(folder / "quarantine" / SEALED)
    store = reopened(folder)
    assert live_ids(store) == {"5000", "5001"}
    assert store.status().quarantined == (SEALED, f"{SEALED}.2")
    store.close()


def open_with_three(folder: Path) -> tuple[Path, list[int]]:
    """An open segment of three batches, and where they end."""
    store = open_store(folder)
    path = folder / "segment-000001.arrows.open"
    sizes = []
    for first in (0, 3, 6):
        store.insert(numbered(first, 3))
        sizes.append(path.stat().st_size)
    store.close()
    return path, sizes


def test_a_damaged_batch_in_an_open_segment_costs_its_own_rows_only(tmp_path):
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
            status = store.status()
            assert (status.lost, status.cut_bytes) == (3, 0)
            assert status.sources["policy"].inserted == status.sources["policy"].live == 6
            store.close()
        name = f"{path.name}.{sizes[0]}-{sizes[1]}"
        assert status.quarantined == (name,)
        assert (folder / "quarantine" / name).read_bytes() == bad[sizes[0] : sizes[1]]
        (lost,) = [event for event in read_events(folder).to_pylist() if event["event"] == "remove"]
        assert (lost["rows"], lost["source"], lost["reason"]) == ([3, 4, 5], None, "quarantine")
        store = open_store(folder)
        assert store.insert(numbered(3, 3)).accepted == 3, "what is lost may come again"
        assert store.next_row == 12
        store.close()
    assert path.read_bytes() == content


def test_damage_in_the_last_batch_is_no_torn_write(tmp_path):
    path, sizes = open_with_three(tmp_path / "b")
    flip(path, sizes[2] - 100)
    for _ in range(2):
        store = open_store(tmp_path / "b")
        assert live_ids(store) == {str(number) for number in range(6)}
        assert (store.next_row, store.status().lost) == (9, 3)
        assert store.status().quarantined == (f"{path.name}.{sizes[1]}-{sizes[2]}",)
        store.close()


def test_a_damaged_header_costs_nothing(tmp_path):
    path, _ = open_with_three(tmp_path / "b")
    flip(path, 100)
    store = open_store(tmp_path / "b")
    assert live_ids(store) == {str(number) for number in range(9)}
    store.insert(numbered(9, 3))
    store.close()
    with path.open("rb") as file:
        batches = list(pa.ipc.open_stream(file))
    assert [id_ for batch in batches for id_ in ids_of(batch)] == [str(number) for number in range(12)]
    assert scan_open(path, batches[0].schema).damaged == ()


def test_a_torn_write_is_cut_off_wherever_it_is_torn(tmp_path):
    """Of the last two batches; nothing that was acknowledged before is missing, nothing is put aside."""
    path, sizes = open_with_three(tmp_path / "b")
    content = path.read_bytes()
    log = (tmp_path / "b" / "consumption-000001.arrows.open").read_bytes()
    for size in sorted({*range(sizes[0], sizes[2], 23), sizes[1] - 1, sizes[1], sizes[1] + 1, sizes[2] - 1}):
        path.write_bytes(content[:size])
        store = open_store(tmp_path / "b")
        kept = 3 if size < sizes[1] else 6
        assert live_ids(store) == {str(number) for number in range(kept)}
        assert store.status().cut_bytes == size - sizes[kept // 3 - 1]
        assert store.status().quarantined == ()
        store.close()
    assert (tmp_path / "b" / "consumption-000001.arrows.open").read_bytes() == log, "nothing had to be noted"
