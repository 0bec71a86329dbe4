"""The whole job, with engines, on a Ray cluster of three nodes: learner and actors live apart from the driver; and that
cluster dies under a run.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.monitoring.run_log import LOG_FILE
from launch.run_folder.folder import CLUSTER_FILE
from tests.integration.ray_head import BIN, RayHead
from tests.integration.train_process import ARITHMETIC, ROOT, TINY, metrics_of, trajectories_of
from tests.processes import send_to_all, wait_until

TIMEOUT_S = 900.0

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    """The last test ends all of it."""
    with RayHead(num_cpus=0, workers=(1, 1)) as started:
        yield started


def submit(head: RayHead, runs: Path, name: str, *arguments: str) -> subprocess.Popen[str]:
    words = (str(ROOT / ARITHMETIC), *TINY, *arguments, f"runs_folder={runs}", "--name", name, "--no-evaluate")
    return subprocess.Popen(
        [str(BIN / "sequencematch"), "submit", *words, "--address", head.address],
        cwd=runs.parent,
        env=head.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_submitted_run_trains_with_actors_on_other_nodes_and_leaves_nothing(head: RayHead, tmp_path: Path) -> None:
    """Without the evaluation, which would work in a folder that is gone: nodes on one machine share the place where Ray
    unpacks a job, and one of them unpacks it again below the driver.
    """
    before = {process.pid for process in head.processes("ray::")}
    follower = submit(head, tmp_path / "runs", "whole")
    out, err = follower.communicate(timeout=TIMEOUT_S)
    assert follower.returncode == 0, out + err
    left = [process for process in head.processes("ray::") if process.pid not in before]
    assert not [process for process in left if "IDLE" not in process.name()], left
    assert not head.processes("launch.cli")
    folder = tmp_path / "runs" / "whole"
    assert max(row["step"] for row in metrics_of(folder, "sequencematch")) == 40
    assert sum(batch.num_rows for batch in trajectories_of(folder)) > 0
    assert not (folder / CLUSTER_FILE).exists()
    where = r"127\.0\.0\.[34] \(1\)"
    assert re.search(f"the plan: learner on {where}; actors on {where}", (folder / LOG_FILE).read_text())


def test_who_follows_a_run_is_told_when_its_cluster_dies(head: RayHead, tmp_path: Path) -> None:
    follower = submit(head, tmp_path / "runs", "orphan", "stages.pretrain.steps=1000000")
    folder = tmp_path / "runs" / "orphan"
    wait_until(lambda: metrics_of(folder) or follower.poll() is not None, TIMEOUT_S / 2, "a step of the run")
    assert follower.poll() is None, follower.communicate()
    send_to_all(process for process in head.processes() if process.pid != follower.pid)
    _, err = follower.communicate(timeout=TIMEOUT_S / 4)
    assert follower.returncode == 1, err
    assert "error: lost the log of run orphan" in err
    assert "Traceback" not in err
