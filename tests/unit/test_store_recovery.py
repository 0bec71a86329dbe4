"""What a replay store finds after a crash, after damage, and in folders that are not its own."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from buffer.manifest import CorruptSegmentError
from buffer.settings import BufferSettings
from buffer.store import ReplayStore
from tests.stores import SMALL, crash, draw, live_ids, open_store
from tests.trajectories import CONTRACT, numbered, policy_batch


def test_an_insert_repeated_after_a_crash_is_stored_once(tmp_path):
    store = open_store(tmp_path / "b")
    store.insert(policy_batch(["a", "b"]))
    copy = open_store(crash(tmp_path / "b", tmp_path / "c"))
    assert copy.insert(policy_batch(["a", "b"])).accepted == 0
    assert copy.num_live("policy") == 2
    copy.close()
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
    assert draw(store, 2, 9) is not None
    draw(store, 1, 10)  # drops everything that was left
    copy = open_store(crash(tmp_path / "b", tmp_path / "c"), max_staleness=None)
    assert copy.newest_version == 10
    assert copy.num_live("policy") == 0
    assert copy.status().sources["policy"].dropped_stale == 5
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
        ReplayStore(tmp_path / "b", other, BufferSettings(), seed=0)
    open_store(tmp_path / "b").close()
