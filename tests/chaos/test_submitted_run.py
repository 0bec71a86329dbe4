"""The whole job, with engines, on a Ray cluster of three nodes: learner and actors live apart from the driver; and a
cluster that dies under a run.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from launch.monitoring.run_log import LOG_FILE
from launch.run_folder.folder import CLUSTER_FILE
from tests.integration.ray_head import BIN, RayHead
from tests.integration.train_process import ARITHMETIC, ROOT, TINY, metrics_of, trajectories_of

TIMEOUT_S = 900.0


@pytest.mark.timeout(1200)
def test_a_submitted_run_trains_with_actors_on_other_nodes_and_leaves_nothing(tmp_path: Path) -> None:
    """Without the evaluation, which would work in a folder that is gone: nodes on one machine share the place where Ray
    unpacks a job, and one of them unpacks it again below the driver.
    """
    runs = tmp_path / "runs"
    with RayHead(num_cpus=0, workers=(1, 1)) as head:
        before = {process.pid for process in head.processes("ray::")}
        done = subprocess.run(
            [
                *(str(BIN / "sequencematch"), "submit", str(ROOT / ARITHMETIC), *TINY, f"runs_folder={runs}"),
                *("--name", "whole", "--no-evaluate", "--address", head.address),
            ],
            cwd=tmp_path,
            env=head.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        left = [process for process in head.processes("ray::") if process.pid not in before]
        assert not [process for process in left if "IDLE" not in process.name()], left
        assert not head.processes("launch.cli")
    folder = runs / "whole"
    assert max(row["step"] for row in metrics_of(folder, "sequencematch")) == 40
    assert sum(batch.num_rows for batch in trajectories_of(folder)) > 0
    assert not (folder / CLUSTER_FILE).exists()
    where = r"127\.0\.0\.[34] \(1\)"
    assert re.search(f"the plan: learner on {where}; actors on {where}", (folder / LOG_FILE).read_text())


@pytest.mark.timeout(600)
def test_who_follows_a_run_is_told_when_its_cluster_dies(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "orphan"
    with RayHead(num_cpus=2) as head:
        follower = subprocess.Popen(
            [
                *(str(BIN / "sequencematch"), "submit", str(ROOT / ARITHMETIC), *TINY, "stages.trunk.steps=1000000"),
                *(f"runs_folder={folder.parent}", "--name", "orphan", "--address", head.address),
            ],
            cwd=tmp_path,
            env=head.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + TIMEOUT_S / 2
        while not metrics_of(folder):
            assert follower.poll() is None, follower.communicate()
            assert time.monotonic() < deadline, "the run took no step"
            time.sleep(0.3)
        for process in head.processes():
            if process.pid != follower.pid:
                with contextlib.suppress(psutil.NoSuchProcess):  # the death of one ends others
                    process.kill()
        _, err = follower.communicate(timeout=TIMEOUT_S / 4)
    assert follower.returncode == 1, err
    assert "error: lost the log of run orphan" in err
    assert "Traceback" not in err
