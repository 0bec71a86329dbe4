"""What a replay store finds after a crash, after damage, and in folders that are not its own."""

from __future__ import annotations

import errno
import itertools
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from buffer import disk
from buffer.settings import BufferSettings
from buffer.store.catalog import CorruptStoreError, read_batches, read_events, row_checksum
from buffer.store.shard import SampleKey
from buffer.store.store import ReplayStore
from tests.stores import SMALL, crash, draw, live_ids, open_store, stored_rows
from tests.trajectories import CONTRACT, numbered

SEGMENT = "segment-000001.arrows"


def test_complete_batches_behind_the_catalog_are_adopted(tmp_path):
    """A loss of power may take the commits of inserts, whose segment was synced."""
    folder = torn_folder(tmp_path, lambda message: message)
    for _ in range(2):
        store = open_store(folder)
        assert live_ids(store) == {str(number) for number in range(6)}
        counters = store.status().sources["policy"]
        assert (store.next_row, counters.inserted, counters.live) == (6, 6, 6)
        assert store.insert(numbered(3, 3)).present == 3
        store.close()


def test_adopted_batches_may_be_followed_by_a_torn_one_or_by_damage(tmp_path, caplog):
    for name, spoil, is_kept in (
        ("torn", lambda second: second[:100], False),
        ("damaged", lambda second: second[:200] + b"!" + second[201:], False),
        ("damaged before a sound one", lambda second: second[:200] + b"!" + second[201:], True),
    ):
        store = open_store(tmp_path / name)
        store.insert(numbered(0, 3))
        folder = crash(tmp_path / name, tmp_path / f"{name} found")
        begins = []
        for first in (3, 6, 9):
            begins.append(store.status().size_bytes)
            store.insert(numbered(first, 3))
        content = (tmp_path / name / SEGMENT).read_bytes()
        end = store.status().size_bytes
        store.close()
        third = content[begins[2] : end] if is_kept else b""
        found = content[: begins[1]] + spoil(content[begins[1] : begins[2]]) + third
        (folder / SEGMENT).write_bytes(found.ljust(len(content), b"\0"))
        store = open_store(folder)
        assert live_ids(store) == {str(number) for number in range(6)}, "nothing was drawn of what follows"
        assert store.next_row == 6
        aside = store.status().quarantined
        assert [name.rpartition("-")[0] for name in aside] == [f"{SEGMENT}.{begins[1]}"] * is_kept
        store.close()


def torn_folder(tmp_path, spoil):
    """A folder whose catalog ends before the second of two batches; spoil: what is there of the bytes of that one."""
    store = open_store(tmp_path / "b")
    store.insert(numbered(0, 3))
    begin = store.status().size_bytes
    folder = crash(tmp_path / "b", tmp_path / "found")
    store.insert(numbered(3, 3))
    content = (tmp_path / "b" / SEGMENT).read_bytes()
    message = spoil(content[begin : store.status().size_bytes])
    store.close()
    path = folder / SEGMENT
    path.write_bytes((content[:begin] + message).ljust(len(content), b"\0"))
    return folder


def test_damage_of_the_catalog_is_an_error_that_says_what_to_do(tmp_path):
    store = open_store(tmp_path / "b", capacity=1000, segment_bytes=SMALL)
    while store.status().sealed_segments < 1:
        store.insert(numbered(store.next_row, 10))
    draw(store, 5, 0)
    store.close()

    def damaged(name, damage):
        folder = crash(tmp_path / "b", tmp_path / name)
        damage(folder)
        with pytest.raises(CorruptStoreError) as caught:
            open_store(folder, capacity=1000)
        with pytest.raises(CorruptStoreError):  # the first refusal let go of the folder
            open_store(folder, capacity=1000)
        assert "restore it from a copy" in str(caught.value)
        return str(caught.value)

    def changed(statement):
        def damage(folder):
            with closing(sqlite3.connect(folder / "catalog.db")) as connection:
                connection.execute(statement)
                connection.commit()

        return damage

    assert "but no catalog.db" in damaged("no catalog", lambda folder: (folder / "catalog.db").unlink())
    assert "catalog.db is damaged" in damaged("torn", lambda folder: os.truncate(folder / "catalog.db", 5000))
    assert "catalog.db is damaged" in damaged("other", lambda folder: (folder / "catalog.db").write_bytes(b"x" * 9000))
    assert "row of events with seq 1 does not agree with its checksum" in damaged(
        "event", changed("update events set whole = 6")
    )
    assert "row of batches with first_row 0" in damaged("batch", changed("update batches set offset = offset + 8"))
    assert "event 1 is missing" in damaged("gap", changed("delete from events where seq = 1"))
    assert "rows of" in damaged("rows", changed("delete from batches where first_row = 0"))


def test_another_format_is_refused_in_one_sentence(tmp_path):
    for name in ("manifest.json", "consumption-000001.arrows.open", "segment-000001.arrows.open"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("{}")
        with pytest.raises(ValueError, match=f"holds {name} but no catalog.db: an earlier version"):
            open_store(folder)
        assert sorted(path.name for path in folder.glob("*.*")) == [name], "nothing is deleted"
    open_store(tmp_path / "b").close()
    with closing(sqlite3.connect(tmp_path / "b" / "catalog.db")) as connection:
        row = ("format", "99")
        connection.execute("replace into meta values(?, ?, ?)", (*row, row_checksum(row)))
        connection.commit()
    with pytest.raises(ValueError, match="has format 99; this program reads"):
        open_store(tmp_path / "b")


def test_one_process_at_a_time_and_one_contract(tmp_path):
    store = open_store(tmp_path / "b")
    with pytest.raises(ValueError, match="in use by another process"):
        open_store(tmp_path / "b")
    store.close()
    other = CONTRACT.__class__(32, 1, 2, "other")
    with pytest.raises(ValueError, match="another tokenizer"):
        ReplayStore(tmp_path / "b", other, BufferSettings(), seed=0)
    open_store(tmp_path / "b").close()


def test_other_hosts_get_an_image_of_the_catalog(tmp_path, monkeypatch):
    """On a file system that hosts share the store holds the catalog alone: nobody else can open it."""
    assert not disk.is_shared(Path("/dev/shm")), "a tmpfs is the memory of one host"
    monkeypatch.setattr(disk, "LOCAL_FILE_SYSTEMS", frozenset())
    store = open_store(tmp_path / "b")
    store.insert(numbered(0, 5))
    assert draw(store, 2, 0) is not None
    with closing(sqlite3.connect(tmp_path / "b" / "catalog.db")) as other, pytest.raises(sqlite3.OperationalError):
        other.execute("select * from events")
    with closing(sqlite3.connect(":memory:")) as image:
        image.deserialize(store.catalog_image())
        assert [event.kind for event in read_events(image, tmp_path)] == ["draw", "checkpoint"]
        assert [entry.num_rows for entry in read_batches(image, tmp_path)] == [5]
    store.close()
    store = open_store(tmp_path / "b")
    assert live_ids(store) == {str(number) for number in range(5)}
    store.close()


@pytest.mark.parametrize("space", [0, 1, 2, 3, 5, 8])
def test_a_full_disk_is_told_with_its_place_and_changes_nothing(tmp_path, space):
    """SQLite itself refuses pages beyond a limit, as it does when the disk refuses them."""
    folder = tmp_path / "b"
    store = open_store(folder, capacity=60, segment_bytes=SMALL)
    key = SampleKey("s", 0, "policy")
    store.insert(numbered(0, 20))
    drawn = store.sample(key, 10, 0)
    connection = store._shard.catalog._connection
    (pages,) = connection.execute("pragma page_count").fetchone()
    connection.execute(f"pragma max_page_count={pages + space}")
    steps = itertools.count(1)

    def work() -> None:
        for step in itertools.islice(steps, 1000):
            store.insert(numbered(step * 20, 20))
            assert store.sample(SampleKey("s", step, "policy"), 10, 0) is not None

    with pytest.raises(OSError, match=r"No space left on device .*catalog\.db") as caught:
        work()
    assert caught.value.errno == errno.ENOSPC
    step = next(steps) - 1
    copy = open_store(crash(folder, tmp_path / "c"), capacity=60, segment_bytes=SMALL)
    connection.execute("pragma max_page_count=1000000")
    for each in (store, copy):
        result = each.insert(numbered(step * 20, 20))
        assert (result.accepted, result.present) in ((20, 0), (0, 20))
        assert each.sample(SampleKey("s", step, "policy"), 10, 0) is not None
        assert each.sample(key, 10, 0).batch.equals(drawn.batch)
        assert each.num_live("policy") == 60
        counters = each.status().sources["policy"]
        assert counters.inserted == each.next_row == counters.live + sum(counters.removed.values())
        each.close()
    assert sorted({*stored_rows(folder)}) == stored_rows(folder)


def test_a_full_disk_under_a_segment_is_told_with_its_place(tmp_path, monkeypatch):
    store = open_store(tmp_path / "b")
    store.insert(numbered(0, 3))

    def refuse(descriptor: int, content: memoryview, offset: int) -> int:
        if len(content) > 500:
            return pwrite(descriptor, content[:500], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    pwrite = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refuse)
        with pytest.raises(OSError, match=SEGMENT):
            store.insert(numbered(3, 3))
    assert live_ids(store) == {"0", "1", "2"}
    copy = open_store(crash(tmp_path / "b", tmp_path / "c"))
    for each in (store, copy):
        assert each.insert(numbered(3, 3)).accepted == 3
        assert live_ids(each) == {str(number) for number in range(6)}
        each.close()
