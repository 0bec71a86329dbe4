"""Ranks that fail, die or hang, as processes of their own: the others are told, and wait no longer than they must."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.integration.rank_worker import HANG_TIMEOUT_S, TIMEOUT_S, failures, hangs, run_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What three ranks are told when draws fail, and when the last of them is killed."""
    folder = tmp_path_factory.mktemp("failures")
    assert run_ranks(3, failures, folder) == [0, 0, -signal.SIGKILL]
    return folder


@pytest.mark.parametrize(
    ("rank", "told"),
    [
        (0, "TimeoutError: no rollouts came"),
        (1, "RankLostError: learner rank 1: rank 0 could not sample a batch"),
        (2, "RankLostError: learner rank 2: rank 0 could not sample a batch"),
    ],
)
def test_a_stop_or_a_failure_at_rank_0_reaches_all(failed, rank, told):
    stopped, failure, asked = (failed / f"draws {rank}.txt").read_text().splitlines()
    assert stopped == asked == "StopRequestedError: "
    assert failure == told


def test_a_loss_that_is_not_finite_is_told_by_all_alike(failed):
    told = {(failed / f"diverged {rank}.txt").read_text() for rank in range(3)}
    assert len(told) == 1
    assert next(iter(told)).startswith("FloatingPointError: step 0: loss inf"), told


@pytest.mark.parametrize("rank", [0, 1])
def test_the_loss_of_a_rank_is_noticed_by_the_others(failed, rank):
    seconds, told = (failed / f"lost {rank}.txt").read_text().splitlines()
    assert float(seconds) < TIMEOUT_S / 2, "noticed by the time-out only"
    assert told.startswith(f"RankLostError: learner rank {rank} of 3 lost the other ranks during step 0, or "), told


def test_a_rank_that_hangs_is_given_up_after_the_time_out(tmp_path):
    assert run_ranks(2, hangs, tmp_path, HANG_TIMEOUT_S) == [0, 0]
    told = (tmp_path / "hung.txt").read_text()
    assert told.startswith("RankLostError: learner rank 0 of 2 lost the other ranks during a maximum, or "), told
    assert f"{HANG_TIMEOUT_S * 1000:.0f}ms" in told
