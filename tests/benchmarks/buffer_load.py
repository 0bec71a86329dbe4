"""What the buffer's benchmark stores: rollouts of different lengths, the same ones for every store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actors.engine.interface import FinishedLog, SamplingSettings, logs_to_batch
from actors.settings import ActorsSettings
from buffer.trajectory.schema import TokenContract

CONTRACT = TokenContract(vocab_size=49_152, backspace_id=3, eos_id=2, tokenizer_hash="0" * 32)
SAMPLING = SamplingSettings(max_new_tokens=512, max_actions=512)
FIRST_TEXT_ID = 4
BACKSPACE_RATE = 0.1
ACTIONS, PROMPT_TOKENS = (50, 500), (16, 64)
SENT_ROWS: int = ActorsSettings().insert_rows
"""Rows per insert that rates are told of: what an actor sends."""

NUM_DISTINCT = 1024
"""Rollouts that are made; a store of more rows holds each of them several times, under ids of their own."""

Padded = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True)
class RolloutLoad:
    """Rollouts as an actor has them when they are finished: one array per column and rollout.

    longest_prompt, longest_log: the widths that stores of fixed-size rows reserve.
    """

    logs: tuple[FinishedLog, ...]
    longest_prompt: int
    longest_log: int

    def rollouts(self, first: int, count: int) -> list[FinishedLog]:
        """The rollouts numbered first, first + 1, ...; each number has an id of its own."""
        return [
            replace(self.logs[number % len(self.logs)], request_id=f"bench-{number:012d}-0123456789abcdef")
            for number in range(first, first + count)
        ]


def make_rollouts(actions: tuple[int, int], prompt: tuple[int, int], seed: int) -> RolloutLoad:
    """Rollouts with `actions` and `prompt` tokens (fewest, most), all lengths equally likely."""
    generator = np.random.default_rng(seed)
    logs = []
    for number in range(NUM_DISTINCT):
        length = int(generator.integers(actions[0], actions[1] + 1))
        ids = generator.integers(FIRST_TEXT_ID, CONTRACT.vocab_size, length, dtype=np.int32)
        backspace = generator.random(length) < BACKSPACE_RATE
        backspace[0] = False
        backspace[1:] &= ~backspace[:-1]  # each takes back the token before it
        ids[backspace] = CONTRACT.backspace_id
        logs.append(
            FinishedLog(
                request_id="",
                prompt_ids=generator.integers(
                    FIRST_TEXT_ID, CONTRACT.vocab_size, generator.integers(prompt[0], prompt[1] + 1), dtype=np.int32
                ),
                actions=ids,
                logprobs=-generator.random(length, dtype=np.float32),
                policy_version=np.sort(generator.integers(number // 100, number // 100 + 2, length, dtype=np.int32)),
                finish_reason="max_actions",
            )
        )
    return RolloutLoad(tuple(logs), prompt[1], actions[1])


def as_arrow(logs: Sequence[FinishedLog]) -> pa.RecordBatch:
    """As our actors send them."""
    return logs_to_batch(logs, CONTRACT, task="bench", actor="actor-0", sampling=SAMPLING, weights_fingerprint="0" * 32)


def as_padded(logs: Sequence[FinishedLog], load: RolloutLoad) -> Padded:
    """As stores of fixed-size rows take them: every column of numbers, padded to the longest.

    Text (ids, task, actor, fingerprint), which our store keeps too, is left out: numbers stand for it. So are columns
    that are null in a rollout without noise. Padding is done in the quickest way that numpy has.
    """
    count = len(logs)
    padded: Padded = {
        "prompt_ids": np.zeros((count, load.longest_prompt), np.int32),
        "actions": np.zeros((count, load.longest_log), np.int32),
        "logprobs": np.zeros((count, load.longest_log), np.float32),
        "policy_version": np.zeros((count, load.longest_log), np.int32),
    }
    for row, log in enumerate(logs):
        padded["prompt_ids"][row, : len(log.prompt_ids)] = log.prompt_ids
        padded["actions"][row, : len(log.actions)] = log.actions
        padded["logprobs"][row, : len(log.actions)] = log.logprobs
        padded["policy_version"][row, : len(log.actions)] = log.policy_version
    return padded | scalars(logs)


def scalars(logs: Sequence[FinishedLog]) -> Padded:
    """The columns of one number per rollout."""
    count = len(logs)
    columns: Padded = {name: np.zeros(count, number_type) for name, number_type in SCALARS.items()}
    columns["prompt_length"] = np.fromiter((len(log.prompt_ids) for log in logs), np.int32, count)
    columns["length"] = np.fromiter((len(log.actions) for log in logs), np.int32, count)
    return columns


LISTS = ("prompt_ids", "actions", "logprobs", "policy_version")

SCALARS: dict[str, type[np.generic]] = {
    "prompt_length": np.int32,
    "length": np.int32,
    "number": np.int64,
    "source": np.uint8,
    "task": np.int32,
    "finish_reason": np.uint8,
    "temperature": np.float32,
    "top_p": np.float32,
    "floor_mask": np.bool_,
    "reward": np.float32,
    "actor": np.int32,
    "created_at": np.int64,
}
