"""Runs that cannot go on: one line that says why, nothing left running, and the weights of the last good step."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.checkpoints.store import read_progress
from tests.checkpoints import checkpoints_of
from tests.integration.train_process import ARITHMETIC, TINY, TrainProcess, refusal_of

pytestmark = pytest.mark.slow

RUN_TIMEOUT_S = 280.0


def failing_run(tmp_path: Path, stage: str, *overrides: str) -> tuple[str, int]:
    """What the run printed, and the step of the stage's only checkpoint."""
    with TrainProcess(tmp_path, ARITHMETIC, "--no-evaluate", *TINY, "trackers=[]", *overrides) as process:
        assert process.wait(RUN_TIMEOUT_S) == 1, process.printed()
        process.assert_nothing_left()
        printed = " ".join(process.printed().split())
        (checkpoint,) = checkpoints_of(process.folder / "checkpoints" / stage)
        assert not (process.folder / "tensorboard").exists()
    assert "Traceback" not in printed
    return printed, read_progress(checkpoint).step


def test_leaving_the_domain_of_a_divergence(tmp_path: Path) -> None:
    objective = "stages.sequencematch.objective"
    printed, step = failing_run(
        tmp_path,
        "sequencematch",
        f"{objective}.divergence=kl",  # needs no rollouts, so the run has no actors
        f"{objective}.domain_policy=stop",
        f"{objective}.alpha=3",
    )
    assert "OutsideDomainError: step 0: " in printed
    assert "of alpha r on the expert batch left the domain of divergence kl" in printed
    assert step == 0


def test_a_step_that_is_not_finite_on_two_ranks(tmp_path: Path) -> None:
    """The ranks look for the bad trajectories together, and write the checkpoint together."""
    printed, step = failing_run(
        tmp_path,
        "trunk",
        "stages.sequencematch.objective.divergence=mle",
        "stages.trunk.optimizer.learning_rate=1e30",
        "stages.trunk.optimizer.warmup_steps=0",
        "learner.num_ranks=2",
    )
    assert "FloatingPointError: step 1: loss " in printed
    assert "Every trajectory alone has a finite loss: the gradient overflowed inside the model" in printed
    assert step == 1


def test_an_engine_that_cannot_be_born_ends_the_run_at_once(tmp_path: Path) -> None:
    """Only the actor can know that its cache is too small; it is told without restarts, and while the trunk trains."""
    error = refusal_of(tmp_path, ARITHMETIC, *TINY, "actors.kv_cache_gib=1e-6", "stages.trunk.steps=90000")
    assert "actor-0 failed: ValueError: one text of" in error
    assert "actors.kv_cache_gib" in error
