"""Trackers: what they are given arrives, stage by stage, and one that is not installed is named with its extra."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from learner.metrics.log import MetricsLog, TensorBoardTracker, check_trackers


def needs(name: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(missing, reason=f"the optional extra {name!r} is not installed")


def in_a_process(code: str, **environment: str) -> str:
    """These libraries read their environment at import and start threads; the tests' process is not theirs."""
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


TWO_STAGES = """
    from pathlib import Path
    import numpy as np
    from learner.metrics.log import MetricsLog
    with MetricsLog(Path({folder!r}), ["{tracker}"]) as log:
        log.write("pretrain", 1, {{"loss": 2.0}})
        log.write("pretrain", 2, {{"loss": 1.5}})
        log.write("cloning", 1, {{"loss": 1.0}}, {{"staleness": np.array([0, 0, 3])}})
    with MetricsLog(Path({folder!r}), ["{tracker}"]) as log:  # resumed
        log.write("cloning", 2, {{"loss": 0.5}})
"""


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setattr("learner.metrics.log.find_spec", lambda name: None if name == "wandb" else object())
    check_trackers(["tensorboard", "trackio"])
    for refuse in (lambda: check_trackers(["wandb"]), lambda: MetricsLog(tmp_path, ["tensorboard", "wandb"])):
        with pytest.raises(
            ImportError, match=r"^tracker 'wandb' is not installed: pip install 'sequencematch\[wandb\]'"
        ):
            refuse()
    assert not any(tmp_path.iterdir())  # refused before anything was opened


def test_no_tracker_leaves_the_file_alone(tmp_path):
    with MetricsLog(tmp_path, []) as log:
        log.write("pretrain", 1, {"loss": 1.0}, {"staleness": np.array([1])})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert "staleness" not in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")


def test_tensorboard_shows_distributions(tmp_path):
    tracker = TensorBoardTracker(tmp_path)
    tracker.write("cloning", 3, {"loss": 1.0}, {"staleness": np.array([0, 0, 0, 5])})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0}).Reload()
    (event,) = events.Histograms("cloning/staleness")
    assert (event.step, event.histogram_value.num, event.histogram_value.max) == (3, 4, 5)


def test_trackers_are_imported_only_when_asked_for(tmp_path):
    out = in_a_process(
        f"""
        import sys
        from pathlib import Path
        from learner.metrics.log import MetricsLog
        print({{"torch", "tensorboard", "wandb", "trackio"}} & set(sys.modules))
        MetricsLog(Path({str(tmp_path)!r})).close()
        print({{"wandb", "trackio"}} & set(sys.modules))
        """
    )
    assert out.splitlines() == ["set()", "set()"]


@needs("wandb")
def test_wandb_keeps_a_run_per_stage_in_the_run_folder(tmp_path):
    folder = tmp_path / "arithmetic-1"
    folder.mkdir()
    code = TWO_STAGES.format(folder=str(folder), tracker="wandb")
    in_a_process(code, WANDB_MODE="offline", WANDB_SILENT="true")
    # By their files: folders of one run that begin in the same second are numbered.
    runs = {path.name for path in folder.glob("wandb/offline-run-*/*.wandb")}
    assert runs == {"run-arithmetic-1-cloning.wandb", "run-arithmetic-1-pretrain.wandb"}
    pretrain = next(folder.glob("wandb/offline-run-*-pretrain/*.wandb")).read_bytes()
    assert b"loss" in pretrain
    assert b"arithmetic-1" in pretrain


@needs("trackio")
def test_trackio_keeps_a_run_per_stage_and_goes_on_in_it(tmp_path):
    folder = tmp_path / "arithmetic-1"
    folder.mkdir()
    read = """
    from trackio import SQLiteStorage
    for run in sorted(SQLiteStorage.get_runs("sequencematch")):
        print(run, [(row["step"], row["loss"]) for row in SQLiteStorage.get_logs("sequencematch", run)])
    """
    code = TWO_STAGES.format(folder=str(folder), tracker="trackio")
    in_a_process(code, TRACKIO_DIR=str(tmp_path / "trackio"))
    assert in_a_process(read, TRACKIO_DIR=str(tmp_path / "trackio")).splitlines() == [
        "arithmetic-1-cloning [(1, 1.0), (2, 0.5)]",
        "arithmetic-1-pretrain [(1, 2.0), (2, 1.5)]",
    ]
