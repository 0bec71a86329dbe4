"""Trajectory batches for tests of the buffer: random but valid rows, columns to spoil, a small contract."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from buffer.store.shard import SampleKey
from buffer.trajectory.schema import TokenContract, trajectory_schema

BACKSPACE, EOS, VOCAB = 1, 2, 32
CONTRACT = TokenContract(vocab_size=VOCAB, backspace_id=BACKSPACE, eos_id=EOS, tokenizer_hash="abc")
BORN = datetime(2026, 1, 1, tzinfo=UTC)
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "backspace": True}


def row(id_: str, actions: Sequence[int] = (5, BACKSPACE, 6), **changes: object) -> dict[str, object]:
    """One policy row; finish_reason follows the last action."""
    actions = list(actions)
    return {
        "id": id_,
        "source": "policy",
        "task": "copy",
        "prompt_ids": [7, 8],
        "actions": actions,
        "executed": None,
        "logprobs": [-0.5] * len(actions),
        "policy_version": [0] * len(actions),
        "weights_fingerprint": "f0",
        "finish_reason": "eos" if actions and actions[-1] == EOS else "max_actions",
        "sampling": SAMPLING,
        "reward": None,
        "features": None,
        "actor": "actor-0",
        "created_at": BORN,
        **changes,
    }


def expert_row(id_: str, actions: Sequence[int] = (5, EOS), **changes: object) -> dict[str, object]:
    """One expert row."""
    expert = {
        "source": "expert",
        "logprobs": None,
        "policy_version": None,
        "weights_fingerprint": None,
        "sampling": None,
    }
    return row(id_, actions, **{**expert, **changes})


def batch_of(rows: Sequence[dict[str, object]], contract: TokenContract = CONTRACT) -> pa.RecordBatch:
    """A trajectory batch."""
    return pa.RecordBatch.from_pylist(list(rows), schema=trajectory_schema(contract))


def policy_batch(ids: Sequence[str], version: int = 0, seed: int = 0, **changes: object) -> pa.RecordBatch:
    """Rows of random length whose actions never return to the floor."""
    generator = np.random.default_rng((seed, len(ids)))
    rows = []
    for id_ in ids:
        actions = generator.integers(3, VOCAB, size=generator.integers(1, 9)).tolist()
        rows.append(row(id_, actions, policy_version=[version] * len(actions), **changes))
    return batch_of(rows)


def numbered(first: int, count: int, version: int = 0, **changes: object) -> pa.RecordBatch:
    """`policy_batch` whose ids are the numbers from `first`."""
    return policy_batch([str(number) for number in range(first, first + count)], version, seed=first, **changes)


def ids_of(batch: pa.RecordBatch) -> list[str]:
    """Ids in order."""
    ids: list[str] = batch.column("id").to_pylist()
    return ids


_STEPS = itertools.count()


def fresh_key(source: str = "policy") -> SampleKey:
    """The key of a draw that nobody has made yet."""
    return SampleKey("stage", next(_STEPS), source)
