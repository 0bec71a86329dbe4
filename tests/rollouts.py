"""Policy rollouts on the arithmetic task without an engine: a wrong digit is taken back, or not."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from buffer.experts.tasks import Task
from buffer.trajectory.schema import trajectory_schema

START = datetime(2026, 1, 1, tzinfo=UTC)
MAX_DIGITS = 3


def rollouts(task: Task, first: int, count: int, version: int) -> pa.RecordBatch:
    """[count] policy rows with ids `rollout-<number>` from number `first`; each is a function of its number."""
    rows = [_row(task, number, version) for number in range(first, first + count)]
    return pa.RecordBatch.from_pylist(rows, schema=trajectory_schema(task.contract()))


def _row(task: Task, number: int, version: int) -> dict[str, object]:
    generator = np.random.default_rng(number)
    digits = [task.tokenizer.get_vocab()[str(digit)] for digit in range(10)]
    actions: list[int] = []
    for _ in range(generator.integers(1, MAX_DIGITS + 1)):
        actions.append(int(generator.choice(digits)))
        if generator.random() < 0.5:
            actions += [task.backspace_id, int(generator.choice(digits))]
    actions.append(task.eos_id)
    prompts = task.train["prompt_ids"]
    return {
        "id": f"rollout-{number}",
        "source": "policy",
        "task": task.name,
        "prompt_ids": list(prompts[number % len(prompts)]),
        "actions": actions,
        "logprobs": [-1.0] * len(actions),
        "policy_version": [version] * len(actions),
        "weights_fingerprint": f"weights-{version}",
        "finish_reason": "eos",
        "sampling": {"temperature": 1.0, "top_p": 1.0, "backspace": True},
        "actor": "actor-0",
        "created_at": START,
    }
