"""A run whose learner has two ranks, through Ctrl-C, the death of a rank, and a resumption with one."""

from __future__ import annotations

import re
import signal
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from launch.run_folder.folder import CONFIG_FILE
from learner.checkpoints.store import read_progress
from tests.checkpoints import checkpoints_of
from tests.integration.train_process import TrainProcess, metrics_of

pytestmark = pytest.mark.slow

START_TIMEOUT_S = 150.0
STOP_TIMEOUT_S = 60.0
STAGE = "matching"
LAST_STEP = 1_000_000  # more than are ever done
RECIPE = f"""
name: two_ranks
task: {{name: arithmetic, bases: [10], max_digits: 2, train_questions: 200, held_out_questions: 20}}
noise: {{kind: task, rate: 0.3}}
model: {{source: scratch, hidden_size: 64, num_heads: 2, num_layers: 1, max_positions: 64}}
stages:
  - name: {STAGE}
    objective: {{name: sequencematch}}
    steps: {LAST_STEP}
    batch_size: 8
    rollout_batch_size: 8
    publish_every_steps: 5
learner: {{num_ranks: 2, checkpoint_every_steps: 10}}
actors: {{count: 1, max_concurrent: 16, insert_batch_size: 8, rollout: {{max_new_tokens: 12, max_actions: 24}}}}
buffer: {{min_size: 16, segment_bytes: 8000}}
cluster: {{num_cpus: 4, object_store_gib: 0.25}}
"""


@pytest.mark.timeout(600)  # three starts of Ray, and of an engine
def test_ranks_stop_together_and_none_is_left_waiting_for_a_dead_one(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    with TrainProcess(tmp_path / "run", str(recipe), "--no-evaluate") as process:
        process.wait_until(lambda: process.step(STAGE) >= 5, START_TIMEOUT_S, "steps of two ranks")
        folder = process.folder
        process.terminate_all()
        assert process.wait(STOP_TIMEOUT_S) == 75, process.printed()
        process.assert_nothing_left()
    stopped_at = newest_step(folder)
    assert stopped_at == len(metrics_of(folder, STAGE)), "the checkpoint is of the last step"

    with TrainProcess(tmp_path / "resumed", "--no-evaluate", "--resume", str(folder)) as process:
        process.wait_until(lambda: newest_step(folder) >= stopped_at + 20, START_TIMEOUT_S, "checkpoints of two ranks")
        (follower,) = [each for each in process.processes("ray::LearnerWorker") if not writes_metrics(each)]
        follower.send_signal(signal.SIGKILL)
        assert process.wait(STOP_TIMEOUT_S) == 1, process.printed()
        process.assert_nothing_left()
        assert re.search(r"^error: learner rank 1 of 2 died: ", process.stderr, re.MULTILINE), process.printed()
    killed_at = newest_step(folder)

    config = folder / CONFIG_FILE
    text = config.read_text().replace("num_ranks: 2", "num_ranks: 1").replace(str(LAST_STEP), str(killed_at + 10))
    config.write_text(text)
    with TrainProcess(tmp_path / "alone", "--no-evaluate", "--resume", str(folder)) as process:
        assert process.wait(START_TIMEOUT_S) == 0, process.printed()
    rows = metrics_of(folder, STAGE)
    assert {row["step"] for row in rows} == set(range(1, killed_at + 11))
    assert rows[-1]["loss"] < rows[0]["loss"]
    # The actor takes no weights but those whose bytes and probe agree: what two ranks publish is the whole model.
    assert all(later["policy_version"] > earlier["policy_version"] for earlier, later in pairwise(rows[4::5]))


def newest_step(folder: Path) -> int:
    """Of the stage's checkpoints; 0 before the first."""
    checkpoints = checkpoints_of(folder / "checkpoints" / STAGE)
    return read_progress(checkpoints[-1]).step if checkpoints else 0


def writes_metrics(process: psutil.Process) -> bool:
    """Only rank 0 does."""
    return any(Path(file.path).name == "metrics.jsonl" for file in process.open_files())
