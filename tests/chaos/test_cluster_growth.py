"""A cluster that Ray's autoscaler makes larger and smaller: with the plan of a run, its number of actors, its end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.monitoring.run_log import LOG_FILE
from tests.chaos.run_lives import START_TIMEOUT_S, assert_audit_is_clean, newest_step, pool_events, wait_for_steps
from tests.integration.ray_head import BIN, RayHead
from tests.integration.train_process import ARITHMETIC, TINY, TrainProcess
from tests.processes import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

END_TIMEOUT_S = 120.0
GROW_TIMEOUT_S = 6
OVERRIDES = (
    *TINY,
    "stages.pretrain.steps=5",
    "stages.sequencematch.steps=100000",  # the test ends the run by SIGTERM when it has seen all
    "learner.checkpoint_every_steps=1000",
)


SOMEBODY_ELSE = """
import ray
ray.init(log_to_driver=False)
holder = ray.remote(num_cpus=1)(type("Holder", (), {"there": lambda self: True})).remote()
assert ray.get(holder.there.remote(), timeout=100)
input("holds it until its input ends\\n")
"""


def test_a_cluster_grows_and_shrinks_with_a_run(tmp_path: Path) -> None:
    """Each node has room for one process, and that of the head belongs to somebody else."""
    with RayHead(num_cpus=1, grows_by={"CPU": 1}) as head:
        environment = {**head.environment, "RAY_ADDRESS": head.gcs_address}
        plan = (ARITHMETIC, "--no-evaluate", *OVERRIDES)
        with (
            somebody_else(environment),
            TrainProcess(
                tmp_path / "runs", *plan, f"cluster.grow_timeout_s={START_TIMEOUT_S}", environment=environment
            ) as process,
        ):
            process.wait_until(lambda: process.step("sequencematch") >= 5, START_TIMEOUT_S, "steps with rollouts")
            waited = "capacity: the plan needs 2 CPU (1 for learner, 1 for actors), the cluster has 0 free"
            assert waited in (process.folder / LOG_FILE).read_text()
            assert len(head.raylets()) == 3

            scale(process.folder, 2, environment)
            process.wait_until(lambda: "actor-1 ready" in states(process.folder), START_TIMEOUT_S, "the second actor")
            assert len(head.raylets()) == 4

            scale(process.folder, 1, environment)
            process.wait_until(lambda: len(head.raylets()) == 3, START_TIMEOUT_S, "the end of the node without actor")
            wait_for_steps(process, process.folder, beyond=newest_step(process.folder) + 10)
            assert states(process.folder).count("actor-0 ready") == 1, "the node that was taken away is the other one's"

            process.terminate()
            assert process.wait(END_TIMEOUT_S) == 75, process.printed()
            assert "Traceback" not in process.printed()
        assert_audit_is_clean(process.folder)
        wait_for_nodes(head, 1)

        impossible = (f"cluster.grow_timeout_s={GROW_TIMEOUT_S}", "actors.count=2", "actors.resources.tpu=1")
        with TrainProcess(tmp_path / "refused", *plan, *impossible, environment=environment) as process:
            assert process.wait(END_TIMEOUT_S) == 2, process.printed()
            assert (
                f"error: waited {GROW_TIMEOUT_S} s (cluster.grow_timeout_s) for Ray's autoscaler to add nodes: the "
                "plan needs 2 tpu (2 for actors), the cluster has 0 free"
            ) in " ".join(process.stderr.split())
        wait_for_nodes(head, 1)


@contextmanager
def somebody_else(environment: dict[str, str]) -> Iterator[None]:
    """Whose process takes a CPU."""
    with subprocess.Popen(
        [sys.executable, "-c", SOMEBODY_ELSE],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "holds it until its input ends\n"
            yield
        finally:
            process.kill()


def scale(folder: Path, actors: int, environment: dict[str, str]) -> None:
    command = [str(BIN / "sequencematch"), "scale", str(folder), "--actors", str(actors)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def states(folder: Path) -> list[str]:
    """What the pool has told, each as name of the actor and first word of its state."""
    return [" ".join(event.split()[:2]) for event in pool_events(folder)]


def wait_for_nodes(head: RayHead, count: int) -> None:
    wait_until(lambda: len(head.raylets()) == count, END_TIMEOUT_S, f"the cluster to have {count} nodes")
