"""The consumption log alone: events come back after a crash, checkpoints release, files rotate."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from buffer.sampling.lane import LaneSnapshot
from buffer.store.consumption_log import ConsumptionLog, DrawKey, LoggedDraw
from buffer.store.counters import Tally
from buffer.store.event_history import read_events, scan_log_file
from buffer.store.events import Event
from buffer.store.log_state import LogSnapshot, SourceSnapshot
from buffer.store.manifest import CorruptSegmentError
from tests.stores import crash

OPEN = "consumption-000001.arrows.open"


def logged(step, rows, stage="stage", source="policy", version=3):
    return LoggedDraw(DrawKey(stage, step, source), version, np.array(rows, dtype=np.int64), len(rows))


def open_log(folder: Path, rotate_bytes: int = 2**20) -> ConsumptionLog:
    folder.mkdir(exist_ok=True)
    return ConsumptionLog(folder, sync_each_record=False, clock=lambda: 1.5, rotate_bytes=rotate_bytes)


def snapshot(next_row: int, rows=(), tally: Tally | None = None) -> LogSnapshot:
    rows = np.array(rows, dtype=np.int64)
    lane = LaneSnapshot(rows, np.arange(len(rows), dtype=np.int32), None)
    sources = {**LogSnapshot.empty().sources, "policy": SourceSnapshot(lane, tally or Tally())}
    return LogSnapshot(sources, next_row, newest_version=7, first_version=2, rejected=4, lost=1)


def assert_same(found, expected):
    assert found is not None
    assert (found.key, found.policy_version, found.whole) == (expected.key, expected.policy_version, expected.whole)
    assert found.rows.tolist() == expected.rows.tolist(), "in the order in which they were given"


def test_draws_come_back_after_a_crash(tmp_path):
    log = open_log(tmp_path / "a")
    draws = [logged(0, [9, 2, 5]), logged(0, [7], source="expert"), logged(1, [2], version=4)]
    for draw in draws:
        log.append_draw(draw)
    copy = open_log(crash(tmp_path / "a", tmp_path / "b"))
    state = copy.take_state()
    assert [rows.tolist() for rows in state.sources["policy"].drawn] == [[9, 2, 5], [2]]
    assert (state.sources["policy"].tally.draws, state.sources["policy"].tally.drawn) == (2, 4)
    assert (state.newest_version, state.last_row) == (4, 9)
    for each in (log, copy):
        for draw in draws:
            assert_same(each.find(draw.key), draw)
        assert each.find(DrawKey("other", 0, "policy")) is None
        assert each.pinned_rows.tolist() == [2, 5, 7, 9]
        each.close()


def test_a_draw_is_written_like_any_other_event(tmp_path):
    """Byte for byte, also where another draw of its size came before."""
    quick, plain = open_log(tmp_path / "a"), open_log(tmp_path / "b")
    draws = [
        logged(0, [9, 2, 5]),
        logged(7, [2**40, 1, 0], version=-1),
        logged(1, [3], source="expert"),
        logged(2, [8], stage="\u00e9tage"),
        logged(2**33, [4, 5, 6], version=9),
        LoggedDraw(DrawKey("stage", 3, "policy"), 4, np.array([7, 8, 9]), 2**20),
    ]
    for draw in draws:
        quick.append_draw(draw)
        plain.append(draw.to_event())
    for log in (quick, plain):
        log.close()
    assert (tmp_path / "a" / OPEN).read_bytes() == (tmp_path / "b" / OPEN).read_bytes()


def test_a_checkpoint_releases_what_it_covers_also_after_a_crash(tmp_path):
    log = open_log(tmp_path / "a")
    early, late = logged(4, [1, 2], stage="a"), [logged(step, [10 + step]) for step in range(4)]
    for draw in (early, *late):
        log.append_draw(draw)
    log.checkpointed("stage", 2)
    copy = open_log(crash(tmp_path / "a", tmp_path / "b"))
    for each in (log, copy):
        assert each.pinned_rows.tolist() == [12, 13]
        assert each.find(early.key) is None, "a stage before this one is done"
        assert_same(each.find(late[2].key), late[2])
        each.close()


def test_what_else_befell_the_rows_comes_back(tmp_path):
    log = open_log(tmp_path / "a")
    ids = pa.array(["a", None])
    log.append(
        Event("remove", source="policy", policy_version=3, reason="age", rows=np.array([1, 2]), ids=ids),
        Event("remove", reason="quarantine", rows=np.array([5]), ids=ids[1:]),
    )
    log.append(Event("reject", reason="id is null", ids=ids))
    log.append(Event("stage", policy_version=9))
    log.append(Event("seal", source="expert", rows=np.array([3, 4])))
    log.append(Event("priorities", source="policy", rows=np.array([6]), priorities=np.array([0.5], dtype=np.float32)))
    log.close()
    log = open_log(tmp_path / "a")
    state = log.take_state()
    policy = state.sources["policy"]
    assert +policy.tally.removed == {"age": 2}
    assert [rows.tolist() for rows in policy.removed] == [[1, 2]]
    assert [(rows.tolist(), ids.to_pylist()) for rows, ids in state.removed_ids] == [([1, 2], ["a", None])]
    assert (state.lost, [rows.tolist() for rows in state.lost_rows]) == (1, [[5]])
    assert (state.rejected, state.first_version, state.newest_version, state.last_row) == (2, 9, 3, 6)
    assert [rows.tolist() for rows in state.sources["expert"].sealed] == [[3, 4]]
    assert [(rows.tolist(), values.tolist()) for rows, values in policy.priorities] == [([6], [0.5])]
    log.close()


def test_a_torn_record_is_cut_off_at_every_byte_of_the_last_two(tmp_path, caplog):
    log = open_log(tmp_path / "a")
    path = tmp_path / "a" / OPEN
    sizes = []
    for step in range(3):
        log.append_draw(logged(step, [step]))
        sizes.append(path.stat().st_size)
    log.close()
    content = path.read_bytes()
    for cut in range(sizes[0], sizes[2]):
        path.write_bytes(content[:cut])
        whole = 1 if cut < sizes[1] else 2
        scan = scan_log_file(path)
        assert (len(scan.batches), scan.torn_bytes) == (whole + 1, cut - sizes[whole - 1]), "and the snapshot"
        if cut % 32 == 0 or cut == sizes[2] - 1:
            log = open_log(tmp_path / "a")
            assert log.pinned_rows.tolist() == [0, 1][:whole]
            assert log.cut_bytes == cut - sizes[whole - 1]
            assert path.stat().st_size == sizes[whole - 1]
            log.close()
    assert f"cut {sizes[2] - 1 - sizes[1]} bytes of an unfinished event" in caplog.text
    log = open_log(tmp_path / "a")
    log.append_draw(logged(7, [3]))
    log.close()
    log = open_log(tmp_path / "a")
    assert log.pinned_rows.tolist() == [0, 1, 3]
    log.close()


@pytest.mark.parametrize("step", [1, 2])
def test_damage_is_an_error_that_names_the_file(tmp_path, step):
    """In the middle, and in the last event, whose length shows that it was written in full."""
    log = open_log(tmp_path / "a")
    path = tmp_path / "a" / OPEN
    for number in range(3):
        before = path.stat().st_size
        log.append_draw(logged(number, [number], stage=f"stage {number}"))
        if number == step:
            begin = before
    log.close()
    path.write_bytes(path.read_bytes().replace(b"stage %d" % step, b"STAGE %d" % step))
    remedy = "restore it from a copy" if step == 1 else rf"or cut the last event off with `truncate -s {begin} "
    with pytest.raises(CorruptSegmentError, match=rf"consumption-000001\.arrows\.open is damaged from.*{remedy}"):
        open_log(tmp_path / "a")


def test_files_rotate_and_keep_the_history(tmp_path):
    log = open_log(tmp_path / "a", rotate_bytes=20_000)
    for step in range(40):
        log.append_draw(logged(step, [step, 100 + step]))
        if step % 5 == 4:
            log.checkpointed("stage", step - 1)
        if log.is_full:
            log.rotate(snapshot(1000 + step, rows=[step], tally=Tally(inserted=step, draws=step + 1)))
    assert log.pinned_rows.tolist() == [38, 39, 138, 139]
    log.close()
    assert len(sorted((tmp_path / "a").glob("consumption-*.arrows"))) >= 2
    assert len(list((tmp_path / "a").glob("*.open"))) == 1
    assert not list((tmp_path / "a").glob("*.tmp"))
    drawn = [row["rows"] for row in read_events(tmp_path / "a").to_pylist() if row["event"] == "draw"]
    assert drawn == [[step, 100 + step] for step in range(40)], "each once, over all files"
    log = open_log(tmp_path / "a")
    assert_same(log.find(DrawKey("stage", 39, "policy")), logged(39, [39, 139]))
    state = log.take_state()
    assert (state.newest_version, state.first_version, state.rejected, state.lost) == (7, 2, 4, 1)
    policy = state.sources["policy"]
    assert policy.tally.draws == 40
    assert policy.lane.rows.tolist() == [state.next_row - 1000]
    log.close()


def test_a_file_grows_with_its_snapshot(tmp_path):
    log = open_log(tmp_path / "a", rotate_bytes=1000)
    log.append_draw(logged(0, [0]))
    assert log.is_full
    log.rotate(snapshot(10_000, rows=range(10_000)))
    size_bytes = (tmp_path / "a" / "consumption-000002.arrows.open").stat().st_size
    records = 0
    while not log.is_full:
        log.append(
            Event("remove", source="policy", reason="age", rows=np.arange(1000), ids=pa.nulls(1000, pa.string()))
        )
        records += 1
    assert (tmp_path / "a" / "consumption-000002.arrows.open").stat().st_size > 3.9 * size_bytes
    assert records > 20
    log.close()


class KilledError(Exception):
    """Stands for the death of the process."""


def rotate_until_killed(log: ConsumptionLog, monkeypatch, moment: int) -> bool:
    """Die before step `moment` of a rotation; False if it has fewer steps."""
    left = moment

    def counted(function):
        def step(*arguments, **options):
            nonlocal left
            left -= 1
            if left == 0:
                raise KilledError
            return function(*arguments, **options)

        return step

    with monkeypatch.context() as patch:
        for name in ("rename", "open", "write", "unlink", "fsync", "ftruncate"):
            patch.setattr(f"os.{name}", counted(getattr(os, name)))
        try:
            log.rotate(snapshot(10))
        except KilledError:
            return True
    return False


def test_a_crash_between_any_two_steps_of_a_rotation_loses_nothing(tmp_path, monkeypatch):
    kept = [logged(3, [3]), logged(4, [4])]
    for moment in itertools.count(1):
        log = open_log(tmp_path / f"a{moment}")
        for draw in (logged(0, [0]), *kept):
            log.append_draw(draw)
        log.checkpointed("stage", 3)
        before = read_events(tmp_path / f"a{moment}").num_rows
        if not rotate_until_killed(log, monkeypatch, moment):
            break
        check_after_crash(crash(tmp_path / f"a{moment}", tmp_path / f"b{moment}"), kept, before)
    assert moment > 15


def num_draws(folder: Path) -> int:
    return read_events(folder).column("event").to_pylist().count("draw")


def check_after_crash(folder: Path, kept: list[LoggedDraw], num_events: int) -> None:
    assert num_draws(folder) == 3, "a reader sees each event once"
    assert read_events(folder).num_rows >= num_events
    for _ in range(2):
        copy = open_log(folder)
        assert copy.pinned_rows.tolist() == [3, 4]
        for draw in kept:
            assert_same(copy.find(draw.key), draw)
        copy.close()
    copy = open_log(folder)
    copy.append_draw(logged(5, [5]))
    assert num_draws(folder) == 4
    copy.rotate(snapshot(11))
    copy.append_draw(logged(6, [6]))
    assert num_draws(folder) == 5
    copy.close()
    assert len(list(folder.glob("*.open"))) == 1


def test_a_rotation_that_the_disk_refuses_leaves_the_log_as_it_was(tmp_path, monkeypatch):
    log = open_log(tmp_path / "a")
    log.append_draw(logged(0, [0]))
    rename = os.rename

    def refuse(source, target):
        if "000002" in str(target):
            raise OSError(28, "No space left on device")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("buffer.store.consumption_log.os.rename", refuse)
        with pytest.raises(OSError, match="No space left"):
            log.rotate(snapshot(10))
    log.append_draw(logged(1, [1]))
    assert num_draws(tmp_path / "a") == 2
    log.rotate(snapshot(10))
    assert num_draws(tmp_path / "a") == 2
    log.close()


def test_draws_without_their_rows_are_forgotten(tmp_path, caplog):
    log = open_log(tmp_path / "a")
    log.append_draw(logged(0, [1, 2]))
    log.append_draw(logged(1, [3]))
    assert log.forget_unless(lambda rows: 2 not in rows)
    log.rotate(snapshot(4))
    log.close()
    log = open_log(tmp_path / "a")
    assert not log.forget_unless(lambda rows: True)
    assert log.pinned_rows.tolist() == [3]
    assert "step=0" in caplog.text
    log.close()


def test_a_history_without_the_file_that_takes_events_is_an_error(tmp_path):
    log = open_log(tmp_path / "a")
    log.rotate(snapshot(4))
    log.close()
    (tmp_path / "a" / "consumption-000002.arrows.open").unlink()
    with pytest.raises(CorruptSegmentError, match=r"consumption-000002\.arrows\.open is missing: restore it"):
        open_log(tmp_path / "a")
