"""Ctrl-C in the middle of a stage with rollouts, and what `--resume` makes of it."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.run_folder.folder import CONFIG_FILE
from learner.checkpoints.store import read_progress
from tests.checkpoints import checkpoints_of
from tests.integration.train_process import ARITHMETIC, TINY, TrainProcess, metrics_of, refusal_of

pytestmark = pytest.mark.slow

STEPS = 400
START_TIMEOUT_S = 200.0
STOP_TIMEOUT_S = 60.0
STAGE = "sequencematch"
# Segments are small, so that some are sealed; the stage is long, so that Ctrl-C meets it in the middle.
OVERRIDES = (*TINY, f"stages.{STAGE}.steps={STEPS}", "buffer.segment_bytes=8000", "stages.mle_control.steps=2")


@dataclass(frozen=True)
class Interrupted:
    folder: Path
    stopped_at: int


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    """A run that was ended by one Ctrl-C."""
    with TrainProcess(tmp_path_factory.mktemp("interrupted"), ARITHMETIC, "--no-evaluate", *OVERRIDES) as process:
        process.wait_until(lambda: process.step(STAGE) >= 13, START_TIMEOUT_S, "steps with rollouts")
        process.interrupt()
        assert process.wait(STOP_TIMEOUT_S) == 130, process.printed()
        process.assert_nothing_left()
        assert "Traceback" not in process.stdout + process.stderr
        # What it says is what has to be typed.
        assert re.search(r"sequencematch train --resume (\S+)", process.stdout)
        progress = read_progress(checkpoints_of(process.folder / "checkpoints" / STAGE)[-1])
        assert progress.step == process.step(STAGE), "the checkpoint is of the last step that was taken"
        assert 13 <= progress.step < STEPS
        assert not (process.folder / "cluster.json").exists()
        return Interrupted(process.folder, progress.step)


def test_ctrl_c_while_ray_starts_ends_the_command_in_order(tmp_path: Path) -> None:
    with TrainProcess(tmp_path, ARITHMETIC, "--no-evaluate", *OVERRIDES) as process:
        # `ray.init` is under way once its first server runs.
        process.wait_until(lambda: bool(process.processes("gcs_server")), START_TIMEOUT_S, "Ray's first process")
        process.interrupt()
        assert process.wait(STOP_TIMEOUT_S) == 130, process.printed()
        process.assert_nothing_left()


def test_a_damaged_catalog_is_named(interrupted: Interrupted, tmp_path: Path) -> None:
    """Runs before the resumption, on a copy."""
    folder = tmp_path / "copy"
    shutil.copytree(interrupted.folder, folder)
    catalog = folder / "buffer" / "shard-000" / "catalog.db"
    content = bytearray(catalog.read_bytes())
    page = slice(len(content) // 2, len(content) // 2 + 4096)
    content[page] = bytes(byte ^ 0xFF for byte in content[page])
    catalog.write_bytes(content)
    error = refusal_of(tmp_path, "--resume", str(folder))
    assert str(catalog) in error
    assert "restore it from a copy" in error


def test_resume_does_the_steps_that_are_left(interrupted: Interrupted, tmp_path: Path) -> None:
    folder = interrupted.folder
    shorten(folder, interrupted.stopped_at + 15)
    with TrainProcess(tmp_path, "--no-evaluate", "--resume", str(folder)) as process:
        assert process.wait(START_TIMEOUT_S) == 0, process.printed()
        process.assert_nothing_left()
    total = interrupted.stopped_at + 15
    for stage, steps in (("trunk", 20), (STAGE, total), ("mle_control", 2)):
        assert [row["step"] for row in metrics_of(folder, stage)] == list(range(1, steps + 1))
        assert read_progress(checkpoints_of(folder / "checkpoints" / stage)[-1]).finished
    rows = metrics_of(folder, STAGE)
    versions = [row["policy_version"] for row in rows]
    assert versions == sorted(versions)
    before, after = rows[interrupted.stopped_at - 1], rows[interrupted.stopped_at]
    # Version numbers go on, so that staleness counts across the break: new weights for `connect`, and for the stage.
    assert after["policy_version"] > before["policy_version"]
    assert all(row["staleness_max"] <= 2 for row in rows)


def shorten(folder: Path, steps: int) -> None:
    """The interrupted run was planned long, so that Ctrl-C could not come too late; its rest need not be."""
    config = folder / CONFIG_FILE
    text = config.read_text()
    assert text.count(f"steps: {STEPS}\n") == 1
    config.write_text(text.replace(f"steps: {STEPS}\n", f"steps: {steps}\n"))
