"""Runs that end early: nothing is left running, and what fails says why in one line and keeps the last good step."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.checkpoints.store import read_progress
from tests.checkpoints import checkpoints_of
from tests.integration.train_process import ARITHMETIC, TINY, TrainProcess, refusal_of

pytestmark = pytest.mark.slow

RUN_TIMEOUT_S = 280.0
STOP_TIMEOUT_S = 60.0


def test_a_step_that_is_not_finite_on_two_ranks(tmp_path: Path) -> None:
    """The ranks look for the bad trajectories together, and write the checkpoint together."""
    overrides = (
        "trackers=[]",
        "stages.sequencematch.objective.divergence=mle",  # needs no rollouts, so the run has no actors
        "stages.pretrain.optimizer.learning_rate=1e30",
        "stages.pretrain.optimizer.warmup_steps=0",
        "learner.num_ranks=2",
    )
    with TrainProcess(tmp_path, ARITHMETIC, "--no-evaluate", *TINY, *overrides) as process:
        assert process.wait(RUN_TIMEOUT_S) == 1, process.printed()
        process.assert_nothing_left()
        printed = " ".join(process.printed().split())
        (checkpoint,) = checkpoints_of(process.folder / "checkpoints" / "pretrain")
        assert not (process.folder / "tensorboard").exists()
    assert "Traceback" not in printed
    assert "FloatingPointError: step 1: loss " in printed
    assert "Every trajectory alone has a finite loss: the gradient overflowed inside the model" in printed
    assert read_progress(checkpoint).step == 1


def test_an_engine_that_cannot_be_born_ends_the_run_at_once(tmp_path: Path) -> None:
    """Only the actor can know that its cache is too small; it is told without restarts, and while the pretrain
    trains."""
    error = refusal_of(tmp_path, ARITHMETIC, *TINY, "actors.kv_cache_gib=1e-6", "stages.pretrain.steps=90000")
    assert "actor-0 failed: ValueError: one text of" in error
    assert "actors.kv_cache_gib" in error


def test_ctrl_c_while_ray_starts_ends_the_command_in_order(tmp_path: Path) -> None:
    with TrainProcess(tmp_path, ARITHMETIC, "--no-evaluate", *TINY) as process:
        # `ray.init` is under way once its first server runs.
        process.wait_until(lambda: bool(process.processes("gcs_server")), RUN_TIMEOUT_S, "Ray's first process")
        process.interrupt()
        assert process.wait(STOP_TIMEOUT_S) == 130, process.printed()
        process.assert_nothing_left()
