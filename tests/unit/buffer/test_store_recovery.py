"""What a replay store finds after a crash, after damage, and in folders that are not its own."""

from __future__ import annotations

import os
import shutil

import pytest

from buffer.settings import BufferSettings
from buffer.store.manifest import CorruptSegmentError
from buffer.store.replay_store import ReplayStore
from tests.stores import SMALL, crash, draw, live_ids, open_store, settle
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
    """Sealing: next open file, sealed file in place, manifest, then the open file goes. Each state is mixed from two
    folders."""
    after, before_insert = tmp_path / "after", tmp_path / "before insert"
    store = open_store(after, capacity=1000, segment_bytes=SMALL)
    inserted = 0
    while store.status().sealed_segments < seals:
        shutil.rmtree(before_insert, ignore_errors=True)
        crash(after, before_insert)
        inserted += 1
        store.insert(numbered(inserted, 1))
        settle(store)
    store.close()
    # The same insert without the sealing: the state when sealing begins.
    store = open_store(before_insert, capacity=1000)
    store.insert(numbered(inserted, 1))
    before = crash(before_insert, tmp_path / "before sealing")
    store.close()
    names = (f"segment-{seals:06d}.arrows", f"segment-{seals:06d}.arrows.open", f"segment-{seals + 1:06d}.arrows.open")
    everything = {str(number) for number in range(1, inserted + 1)}
    states = {
        "next open file": lambda folder: shutil.copy(after / names[2], folder),
        "next open file without its header": lambda folder: (folder / names[2]).touch(),
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
        settle(store)
        assert not list(folder.glob("*.tmp"))
        store.close()


def test_a_torn_insert_is_cut_off_and_reported(tmp_path, caplog):
    store = open_store(tmp_path / "b")
    store.insert(numbered(0, 3))
    store.insert(numbered(3, 3))
    store.close()
    path = tmp_path / "b" / "segment-000001.arrows.open"
    os.truncate(path, path.stat().st_size - 100)
    torn = path.stat().st_size
    store = open_store(tmp_path / "b")
    assert store.status().cut_bytes == torn - path.stat().st_size > 400
    assert f"cut {store.status().cut_bytes} bytes of an unfinished insert" in caplog.text
    assert live_ids(store) == {"0", "1", "2"}
    store.close()


def test_damage_of_manifest_and_log_is_an_error_that_says_what_to_do(tmp_path):
    store = open_store(tmp_path / "b", capacity=1000, segment_bytes=SMALL)
    while store.status().sealed_segments < 1:
        store.insert(numbered(store.next_row, 10))
        settle(store)
    draw(store, 5, 0)
    store.close()

    def damaged(name, damage):
        folder = crash(tmp_path / "b", tmp_path / name)
        damage(folder)
        with pytest.raises(CorruptSegmentError) as caught:
            open_store(folder, capacity=1000)
        with pytest.raises(CorruptSegmentError):  # the first refusal let go of the folder
            open_store(folder, capacity=1000)
        return str(caught.value)

    def replaced(name, old, new):
        def damage(folder):
            content = (folder / name).read_bytes()
            assert old in content
            (folder / name).write_bytes(content.replace(old, new, 1))

        return damage

    log = "consumption-000001.arrows.open"
    assert "but no manifest.json" in damaged("no manifest", lambda folder: (folder / "manifest.json").unlink())
    assert "is damaged" in damaged("torn", lambda folder: os.truncate(folder / "manifest.json", 50))
    assert "is damaged (its checksum" in damaged(
        "entry", replaced("manifest.json", b'"first_row": 0', b'"first_row": 4')
    )
    other = '{"format": 99}'
    assert "has format 99" in damaged("format", lambda folder: (folder / "manifest.json").write_text(other))
    older = '{"format": 1}'
    assert "earlier version" in damaged("older", lambda folder: (folder / "manifest.json").write_text(older))
    assert "is damaged" in damaged("keys", lambda folder: (folder / "manifest.json").write_text('{"format": 2}'))
    assert f"{log} is damaged from byte" in damaged("log", replaced(log, b"snapshot", b"snapshoT"))
    assert f"{log} is missing" in damaged("no log", lambda folder: (folder / log).unlink())


def test_one_process_at_a_time_and_one_contract(tmp_path):
    store = open_store(tmp_path / "b")
    with pytest.raises(ValueError, match="in use by another process"):
        open_store(tmp_path / "b")
    store.close()
    other = CONTRACT.__class__(32, 1, 2, "other")
    with pytest.raises(ValueError, match="another tokenizer"):
        ReplayStore(tmp_path / "b", other, BufferSettings(), seed=0)
    open_store(tmp_path / "b").close()
