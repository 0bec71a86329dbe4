"""Faults of whole nodes under a run whose actors live apart from the rest: a raylet that is killed, a cut network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from launch.run_folder.folder import CLUSTER_FILE
from tests.chaos.run_lives import START_TIMEOUT_S, assert_audit_is_clean, newest_step, pool_events, wait_for_steps
from tests.chaos.two_hosts import FAR, NEAR, TwoHosts
from tests.integration.ray_head import RayHead
from tests.integration.train_process import ARITHMETIC, TINY, TrainProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

END_TIMEOUT_S = 120.0
HEALTH_TIMEOUT_S = 8
SILENT = f"actor-0 failed: silent for {HEALTH_TIMEOUT_S} s"
READY = "actor-0 ready"
OVERRIDES = (
    *TINY,
    "stages.trunk.steps=5",
    "stages.sequencematch.steps=100000",  # the test ends the run by SIGTERM when it has seen all
    "learner.checkpoint_every_steps=1000",
    "learner.resources.near=1",
    "actors.resources.far=1",
    f"actors.health_timeout_s={HEALTH_TIMEOUT_S}",
    "actors.drain_timeout_s=20",
)


@contextmanager
def run_on(head: RayHead, tmp_path: Path) -> Iterator[TrainProcess]:
    """A run on that cluster, as far as steps with rollouts; it is stopped afterwards, and nothing of it is left."""
    environment = {**head.environment, "RAY_ADDRESS": head.gcs_address}
    with TrainProcess(tmp_path / "runs", ARITHMETIC, "--no-evaluate", *OVERRIDES, environment=environment) as process:
        process.wait_until(lambda: process.step("sequencematch") >= 5, START_TIMEOUT_S, "steps with rollouts")
        yield process
        process.terminate()
        assert process.wait(END_TIMEOUT_S) == 130, process.printed()
        process.assert_nothing_left()
        assert "Traceback" not in process.printed()
        assert not (process.folder / CLUSTER_FILE).exists()
        head.assert_idle()
    assert_audit_is_clean(process.folder)


def test_a_node_that_dies_with_its_actor_is_replaced_by_one_that_joins(tmp_path: Path) -> None:
    with RayHead(num_cpus=2, resources={"near": 1}) as head:
        head.add_node("127.0.0.3", 1, {"far": 1})
        with run_on(head, tmp_path) as process:
            (actor,), (pool,) = head.processes("ray::RolloutActor"), head.processes("ray::ActorPool")
            assert pool.ppid() == raylet_at(head, "127.0.0.2").pid, "it would be lost with the actors' node"
            raylet_at(head, "127.0.0.3").kill()
            process.wait_until(lambda: actor not in head.processes(), START_TIMEOUT_S, "the end of the actor")
            process.wait_until(
                lambda: any(" failed: " in event for event in pool_events(process.folder)),
                START_TIMEOUT_S,
                "the loss to be noticed",
            )
            head.add_node("127.0.0.4", 1, {"far": 1})
            wait_for_successor(process)


def test_a_network_that_is_cut_for_a_while(tmp_path: Path) -> None:
    """Long enough for the actor behind the cut to be given up: whatever it does when it is back, it counts once."""
    try:
        hosts = TwoHosts()
    except PermissionError as error:
        pytest.skip(str(error))
    with hosts, RayHead(num_cpus=2, node=NEAR, resources={"near": 1}) as head:
        head.add_node(FAR, 1, {"far": 1}, within=hosts.on_the_far_one)
        with run_on(head, tmp_path) as process:
            (actor,) = head.processes("ray::RolloutActor")
            hosts.cut()
            process.wait_until(lambda: SILENT in pool_events(process.folder), START_TIMEOUT_S, "the fence")
            assert actor.is_running(), "nobody reaches it to end it"
            hosts.heal()
            process.wait_until(lambda: actor not in head.processes(), START_TIMEOUT_S, "its end, now that it is told")
            wait_for_successor(process)


def wait_for_successor(process: TrainProcess) -> None:
    """Until the learner goes on with the rollouts of the actor's second life."""

    def is_there() -> bool:
        return sum(event.startswith(READY) for event in pool_events(process.folder)) == 2

    process.wait_until(is_there, START_TIMEOUT_S, "the actor's successor")
    wait_for_steps(process, process.folder, beyond=newest_step(process.folder) + 10)


def raylet_at(head: RayHead, node: str) -> psutil.Process:
    (raylet,) = (each for each in head.processes(f"--node_ip_address={node}") if each.name() == "raylet")
    return raylet
