"""Actors come, go and die while the learner trains, and nothing of the run listens beyond this machine. Noise is the
policy's own, so actors make expert rows too.
"""

from __future__ import annotations

import ipaddress
import math
from collections import Counter
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
from transformers import AutoConfig

from actors.pool.controller import PoolStatus
from buffer.experts.tasks import load_task
from buffer.trajectory.validation import validate
from launch.run.control import catalog_image, run_status, scale_run
from launch.run_folder.folder import BUFFER_FOLDER
from launch.settings.recipe import read_recipe
from tests.checkpoints import checkpoints_of
from tests.integration.train_process import ARITHMETIC, TINY, TrainProcess, metrics_of, trajectories_of

pytestmark = pytest.mark.slow

STAGE = "sequencematch"
STEPS = 100_000  # the test ends the run by Ctrl-C when it has seen all
START_TIMEOUT_S = 200.0
SCALE_TIMEOUT_S = 120.0
OVERRIDES = (
    *TINY,
    f"stages.{STAGE}.steps={STEPS}",
    "stages.pretrain.steps=5",
    "learner.checkpoint_every_steps=1000",
    "noise.kind=policy",
    "actors.num_cpus=0.5",
    "buffer.max_staleness=10",
    "buffer.flight.enabled=true",
    # Slow enough for the learner to be still at work after two engine starts.
    "buffer.samples_per_insert=1",
)


class Watched:
    """A live run and the last that its pool said."""

    def __init__(self, process: TrainProcess) -> None:
        self._process = process
        self._asked = 0
        self.pool = PoolStatus(0, -1, ())
        self.sampled = {"policy": 0, "expert": 0}

    def wait_for_pool(self, states: dict[str, str], what: str) -> None:
        """Until the members are exactly these, by name."""

        def reached() -> bool:
            self.ask()
            return {member.name: member.state for member in self.pool.members} == states

        self._process.wait_until(reached, SCALE_TIMEOUT_S, what)

    def wait_for_steps(self, count: int) -> None:
        goal = self._process.step(STAGE) + count
        self._process.wait_until(lambda: self._process.step(STAGE) >= goal, SCALE_TIMEOUT_S, f"{count} more steps")

    def ask(self) -> None:
        status = run_status(self._process.folder)
        assert status.pool is not None
        assert status.buffer is not None
        self.pool = status.pool
        self.sampled = {source: counters.sampled for source, counters in status.buffer.sources.items()}


def test_actors_come_go_and_die_while_the_learner_trains(tmp_path: Path) -> None:
    with TrainProcess(tmp_path, ARITHMETIC, "--no-evaluate", *OVERRIDES) as process:
        process.wait_until(lambda: process.step(STAGE) >= 5, START_TIMEOUT_S, "steps with rollouts")
        run = Watched(process)
        run.wait_for_pool({"actor-0": "running"}, "the first actor")
        assert open_to_others(process) == set()
        image = catalog_image(process.folder, process.folder / BUFFER_FOLDER / "shard-000")
        assert image.startswith(b"SQLite format 3\0"), "other processes of this machine reach all of it"

        before = process.step(STAGE)
        assert scale_run(process.folder, 2).desired == 2
        run.wait_for_pool({"actor-0": "running", "actor-1": "running"}, "the second actor")
        assert process.step(STAGE) > before, "the learner waited for the new actor"
        process.wait_until(lambda: finished_by(asked(run), "actor-1") > 0, SCALE_TIMEOUT_S, "its first rollouts")
        newcomer = run.pool.members[1].status
        assert newcomer is not None
        assert newcomer.rejected == 0
        assert newcomer.policy_version >= run.pool.newest_version - 3, "a late joiner takes the newest weights"
        run.wait_for_steps(10)

        (victim, *_) = process.processes("RolloutActor")
        victim.kill()
        process.wait_until(
            lambda: any(event.kind == "actor_failed" for event in asked(run).events),
            SCALE_TIMEOUT_S,
            "the death to be noticed",
        )
        run.wait_for_pool({"actor-0": "running", "actor-1": "running"}, "the killed actor's successor")
        assert run.pool.failure is None
        (death,) = (event for event in run.pool.events if event.kind == "actor_failed")
        survivor = "actor-1" if death.actor == "actor-0" else "actor-0"
        process.wait_until(
            lambda: all(finished_by(asked(run), name) > 0 for name in ("actor-0", "actor-1")),
            SCALE_TIMEOUT_S,
            "rollouts of both",
        )
        run.wait_for_steps(10)

        assert scale_run(process.folder, 1).desired == 1
        # The successor of the killed one is the youngest, whose engine has the least behind it.
        run.wait_for_pool({survivor: "running"}, "the surplus actor to leave")
        (surplus,) = {"actor-0", "actor-1"} - {survivor}
        newest = run.pool.events[-1]
        assert (newest.kind, newest.actor) == ("actor_left", surplus), "it drained, nobody had to end it"
        # Ray ends the process after it has answered; a busy machine takes a moment.
        process.wait_until(lambda: len(process.processes("RolloutActor")) == 1, SCALE_TIMEOUT_S, "its process to end")
        run.wait_for_steps(10)
        run.ask()
        assert run.sampled["policy"] > 0
        assert run.sampled["expert"] > 0

        process.terminate()
        assert process.wait(SCALE_TIMEOUT_S) == 75, process.printed()
        process.assert_nothing_left()
        folder = process.folder
    check_what_it_left(folder)


def open_to_others(process: TrainProcess) -> set[tuple[str, str]]:
    """Names and addresses of what listens on other addresses than loopback: of Ray, the learner, the buffer with its
    Flight endpoint, and the engine.
    """
    return {
        (each.name(), connection.laddr.ip)
        for each in process.processes()
        for connection in each.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and not is_loopback(connection.laddr.ip)
    }


def is_loopback(text: str) -> bool:
    address = ipaddress.ip_address(text)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def asked(run: Watched) -> PoolStatus:
    run.ask()
    return run.pool


def finished_by(pool: PoolStatus, name: str) -> int:
    statuses = [member.status for member in pool.members if member.name == name]
    return sum(status.trajectories for status in statuses if status is not None)


def check_what_it_left(folder: Path) -> None:
    steps = [row["step"] for row in metrics_of(folder, STAGE)]
    assert steps == list(range(1, len(steps) + 1))
    assert all(math.isfinite(row["loss"]) for row in metrics_of(folder, STAGE))
    settings = read_recipe(folder / "config.yaml")
    newest = checkpoints_of(folder / "checkpoints" / STAGE)[-1]
    contract = load_task(settings.task, max_length=64).contract(AutoConfig.from_pretrained(newest).vocab_size)
    batches = trajectories_of(folder)
    assert all(not validate(batch, contract).rejections for batch in batches)
    rows = pa.Table.from_batches(batches).to_pylist()
    assert all(count == 1 for count in Counter(row["id"] for row in rows).values()), "a successor repeats no id"
    policy = [row for row in rows if row["source"] == "policy"]
    assert {row["actor"] for row in policy} == {"actor-0", "actor-1"}
    # Each of the three lives of an actor marks its trajectories with a prefix of its own.
    assert len({row["id"].rpartition("-")[0] for row in policy}) == 3
    experts = [row for row in rows if row["source"] == "expert"]
    assert any(row["executed"] is not None for row in experts), "noise was injected"
    assert any(contract.backspace_id in row["actions"] for row in experts), "and taken back"
