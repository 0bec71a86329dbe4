"""The number of actors of a live run follows the limiter: up where the learner starves, down where it is slow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.monitoring.run_log import LOG_FILE
from launch.run.control import run_status
from tests.integration.train_process import ARITHMETIC, TINY, TrainProcess

pytestmark = pytest.mark.slow

STAGE = "sequencematch"
START_TIMEOUT_S = 400.0  # two engines start at a time
SCALE_TIMEOUT_S = 200.0
OVERRIDES = (
    *TINY,
    f"stages.{STAGE}.steps=100000",  # the test ends the run by Ctrl-C when it has seen all
    "stages.trunk.steps=5",
    "learner.checkpoint_every_steps=1000",
    "actors.num_cpus=0.5",
    "actors.autoscale={max: 2, window_s: 4}",
)
# A draw of 8 rollouts asks for 160 new ones: more than an actor makes while the learner takes a step.
STARVING = ("buffer.samples_per_insert=0.05", "buffer.samples_per_insert_tolerance=8", "actors.count=1")
# A step over 512 expert trajectories asks for 8 new rollouts.
HELD_BACK = (f"stages.{STAGE}.batch_size=512", "buffer.samples_per_insert=1", "actors.count=2")


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [(STARVING, {"actor-0": "running", "actor-1": "running"}), (HELD_BACK, {"actor-0": "running"})],
    ids=["starving", "held_back"],
)
def test_the_number_of_actors_follows_the_learner(
    tmp_path: Path, overrides: tuple[str, ...], wanted: dict[str, str]
) -> None:
    with TrainProcess(tmp_path, ARITHMETIC, "--no-evaluate", *OVERRIDES, *overrides) as process:
        process.wait_until(lambda: process.step(STAGE) >= 2, START_TIMEOUT_S, "steps with rollouts")

        def reached() -> bool:
            pool = run_status(process.folder).pool
            return pool is not None and {member.name: member.state for member in pool.members} == wanted

        process.wait_until(reached, SCALE_TIMEOUT_S, f"the actors {', '.join(wanted)}")
        goal = process.step(STAGE) + 3
        process.wait_until(lambda: process.step(STAGE) >= goal, SCALE_TIMEOUT_S, "steps with as many actors")
        assert reached(), "it stays so"

        process.terminate()
        assert process.wait(SCALE_TIMEOUT_S) == 75, process.printed()
        process.assert_nothing_left()
        lines = [json.loads(line) for line in (process.folder / LOG_FILE).read_text().splitlines()]
    (decision,) = [line for line in lines if line["event"] == "autoscaled"]
    assert (decision["before"], decision["wanted"]) == (3 - len(wanted), len(wanted))
