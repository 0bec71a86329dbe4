"""The number of actors of a live run follows the limiter: up where the learner starves, down where it takes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.run.control import run_status
from tests.chaos.run_lives import ended, wait_for_steps
from tests.integration.train_process import ARITHMETIC, TINY, TrainProcess, trajectory_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STAGE = "sequencematch"
TIMEOUT_S = 200.0
OVERRIDES = (
    *TINY,
    f"stages.{STAGE}.steps=100000",  # the test ends the run by Ctrl-C when it has seen all
    "stages.pretrain.steps=5",
    "learner.checkpoint_every_steps=1000",
    "learner.health_timeout_s=600",
    "actors.num_cpus=0.5",
    "actors.autoscale={max: 2, window_s: 4}",
    # A draw of 8 rollouts asks for 160 new ones: more than an actor makes while the learner takes a step.
    "buffer.samples_per_insert=0.05",
    "buffer.samples_per_insert_tolerance=8",
)


def test_the_number_of_actors_follows_the_learner(tmp_path: Path) -> None:
    with TrainProcess(tmp_path, ARITHMETIC, "--no-evaluate", *OVERRIDES) as process:
        process.wait_until(lambda: process.step(STAGE) >= 2, TIMEOUT_S, "steps with rollouts")
        folder = process.folder
        process.wait_until(lambda: both_work(process), TIMEOUT_S, "the second actor")
        (learner,) = process.processes("ray::LearnerWorker")
        learner.suspend()  # the actors come to the limit of the ratio, and the limiter holds them back
        process.wait_until(lambda: bool(trajectory_of(folder, "actor_left")), TIMEOUT_S, "the end of the second actor")
        learner.resume()
        wait_for_steps(process, folder, beyond=process.step(STAGE))

        process.interrupt()
        life = ended(process, folder)
        assert life.code == 130, process.printed()
        assert f"go on with: sequencematch train --resume {folder}" in " ".join(process.stdout.split())
        assert life.checkpoint == life.step, "the checkpoint is of the last step that was taken"
    decisions = [(line["before"], line["wanted"]) for line in trajectory_of(folder, "autoscaled")]
    assert decisions[:2] == [(1, 2), (2, 1)]


def both_work(process: TrainProcess) -> bool:
    pool = run_status(process.folder).pool
    return pool is not None and [member.state for member in pool.members] == ["running", "running"]
