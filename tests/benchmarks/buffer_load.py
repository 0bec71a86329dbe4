"""What the buffer's benchmark stores: rollouts of different lengths, the same ones for every store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actors.engine.interface import FinishedRollout, SamplingSettings, rollouts_to_batch
from actors.settings import ActorsSettings
from buffer.trajectory.schema import TokenContract

CONTRACT = TokenContract(vocab_size=49_152, backspace_id=3, eos_id=2, tokenizer_hash="0" * 32)
SAMPLING = SamplingSettings(max_new_tokens=512, max_actions=512)
FIRST_TEXT_ID = 4
BACKSPACE_RATE = 0.1
ACTIONS, PROMPT_TOKENS = (50, 500), (16, 64)
"""Fewest and most; stores of fixed-size rows reserve room for the most."""
SENT_ROWS: int = ActorsSettings().insert_batch_size
"""Rows per insert that rates are told of: what an actor sends."""
NUM_DISTINCT = 1024
"""Rollouts that are made; a store of more rows holds each of them several times, under ids of their own."""

Rollouts = tuple[FinishedRollout, ...]
Padded = dict[str, npt.NDArray[np.generic]]

LISTS = {"prompt_ids": "int32", "actions": "int32", "logprobs": "float32", "policy_version": "int32"}
SCALARS = {
    **dict.fromkeys(("prompt_length", "length", "task", "actor"), "int32"),
    **dict.fromkeys(("number", "created_at"), "int64"),
    **dict.fromkeys(("source", "finish_reason"), "uint8"),
    **dict.fromkeys(("temperature", "top_p", "reward"), "float32"),
    "backspace": "bool",
}


def width(column: str) -> int:
    """Numbers that a row of fixed size has in a column of `LISTS`."""
    return (PROMPT_TOKENS if column == "prompt_ids" else ACTIONS)[1]


def make_rollouts(seed: int, actions: tuple[int, int] = ACTIONS, prompt: tuple[int, int] = PROMPT_TOKENS) -> Rollouts:
    """Rollouts as an actor has them when they are finished, all lengths within the bounds equally likely."""
    generator = np.random.default_rng(seed)
    made = []
    for number in range(NUM_DISTINCT):
        length = int(generator.integers(actions[0], actions[1] + 1))
        ids = generator.integers(FIRST_TEXT_ID, CONTRACT.vocab_size, length, dtype=np.int32)
        backspace = generator.random(length) < BACKSPACE_RATE
        backspace[0] = False
        backspace[1:] &= ~backspace[:-1]  # each takes back the token before it
        ids[backspace] = CONTRACT.backspace_id
        prompt_length = generator.integers(prompt[0], prompt[1] + 1)
        made.append(
            FinishedRollout(
                request_id="",
                prompt_ids=generator.integers(FIRST_TEXT_ID, CONTRACT.vocab_size, prompt_length, dtype=np.int32),
                actions=ids,
                logprobs=-generator.random(length, dtype=np.float32),
                policy_version=np.sort(generator.integers(number // 100, number // 100 + 2, length, dtype=np.int32)),
                finish_reason="max_actions",
            )
        )
    return tuple(made)


def take(rollouts: Rollouts, first: int, count: int) -> list[FinishedRollout]:
    """The rollouts numbered first, first + 1, ...; each number has an id of its own."""
    return [
        replace(rollouts[number % len(rollouts)], request_id=f"bench-{number:012d}-0123456789abcdef")
        for number in range(first, first + count)
    ]


def as_arrow(logs: Sequence[FinishedRollout]) -> pa.RecordBatch:
    """As our actors send them."""
    return rollouts_to_batch(
        logs, CONTRACT, task="bench", actor="actor-0", sampling=SAMPLING, weights_fingerprint="0" * 32
    )


def as_padded(logs: Sequence[FinishedRollout]) -> Padded:
    """As stores of fixed-size rows take them: every column of numbers, padded to the longest in the quickest way that
    numpy has. Text, which our store keeps too, is left out: numbers stand for it. So are columns that are null in a
    rollout without noise.
    """
    padded: Padded = {name: np.zeros((len(logs), width(name)), number) for name, number in LISTS.items()}
    for row, log in enumerate(logs):
        padded["prompt_ids"][row, : len(log.prompt_ids)] = log.prompt_ids
        padded["actions"][row, : len(log.actions)] = log.actions
        padded["logprobs"][row, : len(log.actions)] = log.logprobs
        padded["policy_version"][row, : len(log.actions)] = log.policy_version
    return padded | scalars(logs)


def scalars(logs: Sequence[FinishedRollout]) -> Padded:
    """The columns of one number per rollout."""
    count = len(logs)
    columns: Padded = {name: np.zeros(count, number) for name, number in SCALARS.items()}
    columns["prompt_length"] = np.fromiter((len(log.prompt_ids) for log in logs), np.int32, count)
    columns["length"] = np.fromiter((len(log.actions) for log in logs), np.int32, count)
    return columns
