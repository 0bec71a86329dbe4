"""A run whose engines are divided over two processes: the second one hangs, then that of the successor is killed, in
mid-rollout; each time the pool replaces the actor, and the run goes on.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.run_lives import LONG, STAGE, START_TIMEOUT_S, assert_audit_is_clean, ended, pool_events
from tests.integration.train_process import ARITHMETIC, TINY, TrainProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SILENCE_S = 15
OVERRIDES = (
    *TINY,
    *LONG,
    "stages.pretrain.steps=5",
    "actors.tensor_parallel_size=2",
    f"actors.health_timeout_s={SILENCE_S}",
)


def test_an_actor_goes_with_any_of_its_processes_and_the_run_goes_on(tmp_path: Path) -> None:
    with TrainProcess(tmp_path, ARITHMETIC, "--no-evaluate", *OVERRIDES) as process:
        process.wait_until(lambda: process.step(STAGE) > 3, START_TIMEOUT_S, "steps with rollouts")
        folder = process.folder
        (hung,) = process.processes("ray::EngineRank")
        hung.suspend()
        process.wait_until(lambda: len(failures(folder)) == 1, START_TIMEOUT_S, "the fence")
        process.wait_until(lambda: not hung.is_running(), START_TIMEOUT_S, "the end of the process that hangs")
        wait_for_more_rollouts(process)
        (lost,) = process.processes("ray::EngineRank")
        lost.kill()
        process.wait_until(lambda: len(failures(folder)) == 2, START_TIMEOUT_S, "the pool to know")
        wait_for_more_rollouts(process)
        process.terminate()
        assert ended(process, folder).code == 75, process.printed()
    hanging, dead = failures(folder)
    assert "EngineRankError: rank 1 of actor-0 did not answer: " in hanging
    assert "EngineRankError: rank 1 of actor-0 died" in dead
    assert_audit_is_clean(folder)


def wait_for_more_rollouts(process: TrainProcess) -> None:
    """Until steps are done for which the successor had to make rollouts."""
    before = process.step(STAGE)
    process.wait_until(lambda: process.step(STAGE) > before + 10, START_TIMEOUT_S, f"steps beyond {before}")


def failures(folder: Path) -> list[str]:
    return [event for event in pool_events(folder) if " failed: " in event]
