"""The metrics of a run, as they are read while it lives and after it was killed."""

from __future__ import annotations

import json
import math
import os
import signal
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from learner.metrics.log import MetricsLog


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_line_per_step_can_be_read_at_once(tmp_path):
    started = time.time()
    with MetricsLog(tmp_path) as log:
        log.write("pretrain", 1, {"loss": 1.23456789, "tiny": 1.23456789e-12, "whole": 3})
        assert len(rows(tmp_path)) == 1
        log.write("cloning", 1, {"loss": 0.5})
    first, second = rows(tmp_path)
    assert int(started) <= first["time"] <= time.time() + 1.0  # rounded to milliseconds
    assert {name: first[name] for name in first if name != "time"} == {
        "stage": "pretrain",
        "step": 1,
        "loss": 1.23457,  # six digits are enough for a curve
        "tiny": 1.23457e-12,
        "whole": 3.0,
    }
    assert (second["stage"], second["step"], second["loss"]) == ("cloning", 1, 0.5)


def test_tensorboard_holds_the_same_numbers_by_stage(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in (1, 2):
            log.write("pretrain", step, {"loss": 1.0 / step})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["pretrain/loss"]
    assert [(event.step, event.value) for event in events.Scalars("pretrain/loss")] == [(1, 1.0), (2, 0.5)]


def test_numbers_that_are_not_finite_keep_the_file_standard_json(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write("pretrain", 1, {"nan": math.nan, "inf": math.inf, "loss": 1.0})
    line = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads(line, parse_constant=refuse)
    assert (row["nan"], row["inf"], row["loss"]) == (None, None, 1.0)


def test_a_line_cut_off_by_a_crash_does_not_spoil_the_next(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write("pretrain", 1, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"time": 1.0, "stage": "tru')
    with MetricsLog(tmp_path) as log:
        log.write("pretrain", 2, {"loss": 2.0})
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_a_killed_process_leaves_every_step_that_it_wrote(tmp_path):
    process = os.fork()
    if process == 0:
        try:
            log = MetricsLog(tmp_path)
            for step in range(3):
                log.write("pretrain", step, {"loss": 1.0})
            os.kill(os.getpid(), signal.SIGKILL)
        finally:  # a failure must not go on as a second pytest
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2]


def test_a_full_disk_is_told_with_the_file(tmp_path):
    full = os.open("/dev/full", os.O_WRONLY)
    with MetricsLog(tmp_path, ()) as log:
        os.dup2(full, log._file.fileno())
        with pytest.raises(OSError, match=r"No space left on device: .*metrics\.jsonl"):
            log.write("pretrain", 1, {"loss": 1.0})
    os.close(full)


def full_from_now_on(log, tmp_path):
    """The log, whose TensorBoard finds the disk full when it is closed."""
    (events,) = (tmp_path / "tensorboard").iterdir()
    events.unlink()
    events.symlink_to("/dev/full")
    log.write("pretrain", 1, {"loss": 1.0})
    return log


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread dies of it
def test_a_full_disk_is_told_with_the_folder_of_tensorboard(tmp_path):
    log = full_from_now_on(MetricsLog(tmp_path), tmp_path)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/tensorboard'"):
        log.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_ended_a_stage_is_told_though_its_curve_cannot_be_closed(tmp_path):
    log = full_from_now_on(MetricsLog(tmp_path), tmp_path)
    with pytest.raises(FloatingPointError, match="loss inf"), log:
        raise FloatingPointError("loss inf")
