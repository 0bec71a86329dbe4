"""A run whose training diverges ends with exit code 1, a line that says why, and the weights of its last good step."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.checkpoint import read_progress
from learner.checkpoint_store import checkpoints_of
from tests.integration.train_process import ARITHMETIC, TINY, TrainProcess

pytestmark = pytest.mark.slow

RUN_TIMEOUT_S = 120.0
KL = (
    "stages.sequencematch.objective.divergence=kl",  # needs no rollouts, so the run has no actors
    "stages.sequencematch.objective.domain_policy=stop",
    "stages.sequencematch.objective.alpha=3",
    "trackers=[]",
)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_leaving_the_domain_of_a_divergence(tmp_path: Path, num_ranks: int) -> None:
    ranks = f"learner.num_ranks={num_ranks}"
    with TrainProcess(tmp_path, ARITHMETIC, "--no-evaluate", *TINY, *KL, ranks) as process:
        assert process.wait(RUN_TIMEOUT_S) == 1, process.printed()
        process.assert_nothing_left()
        printed = " ".join(process.printed().split())
        folder = process.folder
    assert "OutsideDomainError: step 0: " in printed
    assert "of alpha r on the expert batch left the domain of divergence kl" in printed
    assert "Traceback" not in printed
    (checkpoint,) = checkpoints_of(folder / "checkpoints" / "sequencematch")
    assert read_progress(checkpoint).step == 0
    assert not list(folder.glob("tensorboard"))
