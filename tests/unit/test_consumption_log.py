"""The consumption log alone: records come back after a crash, checkpoints release, files rotate."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from buffer.consumption_log import ConsumptionLog, DrawKey, LoggedDraw
from buffer.manifest import CorruptSegmentError
from tests.stores import crash


def logged(step, rows, stage="stage", source="policy", version=3):
    return LoggedDraw(DrawKey(stage, step, source), version, np.array(rows, dtype=np.int64))


def open_log(folder: Path, rotate_bytes: int = 2**20) -> ConsumptionLog:
    folder.mkdir(exist_ok=True)
    return ConsumptionLog(folder, sync_each_record=False, rotate_bytes=rotate_bytes)


def assert_same(found, expected):
    assert found is not None
    assert (found.key, found.policy_version) == (expected.key, expected.policy_version)
    assert found.rows.tolist() == expected.rows.tolist(), "in the order in which they were given"


def test_draws_come_back_after_a_crash(tmp_path):
    log = open_log(tmp_path / "a")
    draws = [logged(0, [9, 2, 5]), logged(0, [7], source="expert"), logged(1, [2], version=4)]
    for draw in draws:
        log.append(draw)
    copy = open_log(crash(tmp_path / "a", tmp_path / "b"))
    for each in (log, copy):
        for draw in draws:
            assert_same(each.find(draw.key), draw)
        assert each.find(DrawKey("other", 0, "policy")) is None
        assert each.pinned_rows.tolist() == [2, 5, 7, 9]
        each.close()


def test_a_checkpoint_releases_what_it_covers_also_after_a_crash(tmp_path):
    log = open_log(tmp_path / "a")
    early, late = logged(4, [1, 2], stage="a"), [logged(step, [10 + step]) for step in range(4)]
    for draw in (early, *late):
        log.append(draw)
    log.checkpointed("stage", 2)
    copy = open_log(crash(tmp_path / "a", tmp_path / "b"))
    for each in (log, copy):
        assert each.pinned_rows.tolist() == [12, 13]
        assert each.find(early.key) is None, "a stage before this one is done"
        assert_same(each.find(late[2].key), late[2])
        each.close()


def test_a_torn_record_is_cut_off_wherever_it_is_torn(tmp_path, caplog):
    log = open_log(tmp_path / "a")
    log.append(logged(0, [1]))
    path = tmp_path / "a" / "consumption-000001.arrows.open"
    whole = path.stat().st_size
    log.append(logged(1, [2]))
    log.close()
    size = path.stat().st_size
    for cut in (whole + 1, (whole + size) // 2, size - 1):
        folder = crash(tmp_path / "a", tmp_path / f"cut {cut}")
        os.truncate(folder / path.name, cut)
        log = open_log(folder)
        assert log.find(DrawKey("stage", 1, "policy")) is None
        log.append(logged(1, [3]))
        log.close()
        log = open_log(folder)
        assert log.pinned_rows.tolist() == [1, 3]
        log.close()
    assert f"cut {size - 1 - whole} bytes of an unfinished record" in caplog.text


def test_damage_before_complete_records_is_an_error_that_names_the_file(tmp_path):
    log = open_log(tmp_path / "a")
    for step in range(3):
        log.append(logged(step, [step]))
    log.close()
    path = tmp_path / "a" / "consumption-000001.arrows.open"
    content = bytearray(path.read_bytes())
    content[content.index(b"draw")] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptSegmentError, match=r"consumption-000001\.arrows\.open is damaged from byte"):
        open_log(tmp_path / "a")


def test_files_rotate_at_checkpoints_and_keep_the_history(tmp_path):
    log = open_log(tmp_path / "a", rotate_bytes=3000)
    for step in range(40):
        log.append(logged(step, [step, 100 + step]))
        if step % 5 == 4:
            log.checkpointed("stage", step - 1)
    assert log.pinned_rows.tolist() == [38, 39, 138, 139]
    log.close()
    sealed = sorted((tmp_path / "a").glob("consumption-*.arrows"))
    assert len(sealed) >= 2
    assert len(list((tmp_path / "a").glob("*.open"))) == 1
    assert not list((tmp_path / "a").glob("*.tmp"))
    history = [row for path in sealed for row in pa.ipc.open_stream(path).read_all().to_pylist()]
    drawn = {row["step"]: row["rows"] for row in history if row["event"] == "draw"}
    last = max(drawn)
    assert drawn == {step: [step, 100 + step] for step in range(last + 1)}, "every draw up to the last rotation"
    log = open_log(tmp_path / "a", rotate_bytes=3000)
    assert_same(log.find(DrawKey("stage", 39, "policy")), logged(39, [39, 139]))
    log.close()


class KilledError(Exception):
    """Stands for the death of the process."""


def die(path, *_args, **_options):
    if not Path(path).exists():
        raise FileNotFoundError(path)
    raise KilledError


@pytest.mark.parametrize("moment", ["write_sealed", "os.rename", "sync_folder", "os.unlink"])
def test_a_crash_in_the_middle_of_a_rotation_loses_nothing(tmp_path, monkeypatch, moment):
    log = open_log(tmp_path / "a", rotate_bytes=1000)
    kept = [logged(3, [3]), logged(4, [4])]
    for draw in (logged(0, [0]), *kept):
        log.append(draw)
    with monkeypatch.context() as patch:
        patch.setattr(f"buffer.consumption_log.{moment}", (lambda *_: die(tmp_path)) if "write" in moment else die)
        with pytest.raises(KilledError):
            log.checkpointed("stage", 3)
    copy = open_log(crash(tmp_path / "a", tmp_path / "b"), rotate_bytes=1000)
    assert copy.pinned_rows.tolist() == [3, 4]
    for draw in kept:
        assert_same(copy.find(draw.key), draw)
    copy.checkpointed("stage", 4)
    copy.close()
    assert len(list((tmp_path / "b").glob("*.open"))) == 1


def test_draws_without_their_rows_are_forgotten_for_good(tmp_path):
    log = open_log(tmp_path / "a")
    log.append(logged(0, [1, 2]))
    log.append(logged(1, [3]))
    log.forget_unless(lambda rows: 2 not in rows)
    log.close()
    log = open_log(tmp_path / "a")
    log.forget_unless(lambda rows: True)
    assert log.pinned_rows.tolist() == [3]
    log.close()
