"""Faults of whole nodes under a run whose actors live apart from the rest: a raylet that is killed, a cut network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from launch.run_folder.folder import CLUSTER_FILE
from learner.checkpoints.store import read_progress
from tests.chaos.run_lives import START_TIMEOUT_S, assert_audit_is_clean, newest_step, pool_events, wait_for_steps
from tests.chaos.two_hosts import FAR, NEAR, TwoHosts
from tests.checkpoints import checkpoints_of
from tests.integration.ray_head import RayHead
from tests.integration.train_process import ARITHMETIC, TINY, TrainProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STOP_TIMEOUT_S = 30.0
HEALTH_TIMEOUT_S = 8
SILENT = f"actor-0 failed: silent for {HEALTH_TIMEOUT_S} s"
READY = "actor-0 ready"
PATIENCE = {
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "8",
}
"""Ray takes a node for dead after some 30 s of lost packets (a minute where nothing is set): later than the pool gives
up its actor, also where the machine is busy.
"""
OVERRIDES = (
    *TINY,
    "stages.pretrain.steps=5",
    "stages.sequencematch.steps=100000",  # the test ends the run by SIGTERM when it has seen all
    "learner.checkpoint_every_steps=1000",
    "learner.resources.near=1",
    "actors.resources.far=1",
    f"actors.health_timeout_s={HEALTH_TIMEOUT_S}",
    "actors.drain_timeout_s=20",
)


@contextmanager
def run_on(head: RayHead, tmp_path: Path, *overrides: str, with_cluster: bool = False) -> Iterator[TrainProcess]:
    """A run on that cluster, as far as steps with rollouts; afterwards all its processes get SIGTERM at once, and
    nothing of it is left. with_cluster: Ray's own processes get SIGTERM too, and do not come back. Without it none of
    them may get one, its agents included: a node ends with its agents, and takes the learner with it.
    """
    environment = {**head.environment, "RAY_ADDRESS": head.gcs_address}
    arguments = (ARITHMETIC, "--no-evaluate", *OVERRIDES, *overrides)
    with TrainProcess(tmp_path / "runs", *arguments, environment=environment) as process:
        process.wait_until(lambda: process.step("sequencematch") >= 5, START_TIMEOUT_S, "steps with rollouts")
        yield process
        for each in head.processes() if with_cluster else head.workers():
            with contextlib.suppress(psutil.NoSuchProcess):
                each.terminate()
        process.terminate()
        assert process.wait(STOP_TIMEOUT_S) == 75, process.printed()
        process.assert_nothing_left()
        assert "Traceback" not in process.printed()
        assert not (process.folder / CLUSTER_FILE).exists()
        if with_cluster:
            assert "go on from the last checkpoint with --resume" in process.stderr
        else:
            (newest,) = checkpoints_of(process.folder / "checkpoints" / "sequencematch")
            assert read_progress(newest).step == process.step("sequencematch")
            head.assert_idle()
    assert_audit_is_clean(process.folder)


def test_a_node_that_dies_with_an_actor_and_a_shard_is_replaced_by_one_that_joins(tmp_path: Path) -> None:
    """The shard does not wait for that: it opens its folder on the node that is left."""
    with RayHead(num_cpus=2, resources={"near": 1}) as head:
        head.add_node("127.0.0.3", 1, {"far": 1})
        with run_on(head, tmp_path, "buffer.shards=2", with_cluster=True) as process:
            near, far = raylet_at(head, "127.0.0.2"), raylet_at(head, "127.0.0.3")
            (actor,), (pool,) = head.processes("ray::RolloutActor"), head.processes("ray::ActorPool")
            assert pool.ppid() == near.pid, "it would be lost with the actors' node"
            first, second = sorted(shards_of(head), key=lambda shard: shard.ppid() == far.pid)
            assert (first.ppid(), second.ppid()) == (near.pid, far.pid)
            far.kill()
            process.wait_until(
                lambda: not {actor, second} & set(head.processes()), START_TIMEOUT_S, "the end of actor and shard"
            )
            process.wait_until(
                lambda: any(" failed: " in event for event in pool_events(process.folder)),
                START_TIMEOUT_S,
                "the loss to be noticed",
            )
            process.wait_until(lambda: len(shards_of(head)) == 2, START_TIMEOUT_S, "the shard's next life")
            assert {shard.ppid() for shard in shards_of(head)} == {near.pid}
            head.add_node("127.0.0.4", 1, {"far": 1})
            wait_for_successor(process)


def test_a_network_that_is_cut_for_a_while(tmp_path: Path) -> None:
    """Long enough for the actor behind the cut to be given up: whatever it does when it is back, it counts once. Then
    so long that Ray gives up the node, which ends when it hears of that; it is started again.
    """
    try:
        hosts = TwoHosts()
    except PermissionError as error:
        pytest.skip(str(error))
    with hosts, RayHead(num_cpus=2, node=NEAR, resources={"near": 1}, system=PATIENCE) as head:
        head.add_node(FAR, 1, {"far": 1}, within=hosts.on_the_far_one)
        with run_on(head, tmp_path) as process:
            (actor,) = head.processes("ray::RolloutActor")
            hosts.cut()
            process.wait_until(lambda: SILENT in pool_events(process.folder), START_TIMEOUT_S, "the fence")
            assert actor.is_running(), "nobody reaches it to end it"
            hosts.heal()
            process.wait_until(lambda: actor not in head.processes(), START_TIMEOUT_S, "its end, now that it is told")
            wait_for_successor(process)

            (actor,) = head.processes("ray::RolloutActor")
            hosts.cut()
            process.wait_until(lambda: FAR not in head.live_nodes(), START_TIMEOUT_S, "Ray to take the node for dead")
            assert actor.is_running(), "nobody reaches it to end it"
            hosts.heal()
            process.wait_until(lambda: actor not in head.processes(), START_TIMEOUT_S, "its end with that of its node")
            head.add_node(FAR, 1, {"far": 1}, within=hosts.on_the_far_one)
            wait_for_successor(process, lives=3)


def wait_for_successor(process: TrainProcess, lives: int = 2) -> None:
    """Until the learner goes on with the rollouts of the actor's last life of so many."""

    def is_there() -> bool:
        return sum(event.startswith(READY) for event in pool_events(process.folder)) == lives

    process.wait_until(is_there, START_TIMEOUT_S, "the actor's successor")
    wait_for_steps(process, process.folder, beyond=newest_step(process.folder) + 10)


def shards_of(head: RayHead) -> list[psutil.Process]:
    return head.processes("ray::ReplayBufferService")


def raylet_at(head: RayHead, node: str) -> psutil.Process:
    (raylet,) = (each for each in head.raylets() if f"--node_ip_address={node}" in each.cmdline())
    return raylet
