"""The plan on a real cluster of three nodes: Ray places it, what others hold is waited for, and a refusal says why."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest

from tests.integration.ray_head import RayHead
from tests.integration.train_process import ARITHMETIC, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TIMEOUT_S = 400.0


def test_processes_go_where_there_is_capacity_and_where_the_plan_says() -> None:
    with RayHead(num_cpus=2, workers=(2, 1)) as head:
        done = subprocess.run(
            [sys.executable, "-m", "tests.integration.capacity_worker", ARITHMETIC],
            cwd=ROOT,
            env={**head.environment, "RAY_ADDRESS": head.gcs_address},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["offered"] == {"127.0.0.2": 2, "127.0.0.3": 2, "127.0.0.4": 1}
    assert "the plan needs 2 CPU (2 for " in found["waited"]["told"]
    assert sorted(found["waited"]["nodes"]) == ["127.0.0.2", "127.0.0.3"]
    assert found["spread"] == [1, 1, 1]
    assert found["pack"] == [2]
    assert found["small ranks make way"] == {"learner": ["127.0.0.4"], "actors": ["127.0.0.2", "127.0.0.3"]}
    assert "each actor of 3 needs 1.5 CPU on one node" in found["in pieces"]
    assert "the plan needs 41 CPU (1 for learner, 40 for actors), the cluster has 5 free" in found["too many"]
    assert found["at once"] == 5
    assert all(named == there for named, there in found["shards"]), found["shards"]
    assert sorted(Counter(there for _, there in found["shards"]).values()) == [1, 2, 2]
