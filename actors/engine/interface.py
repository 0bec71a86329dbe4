"""The types of a rollout engine: its settings, the settings of a request, and finished requests as rows of the
trajectory schema. Does not import vLLM, so other modules can use these types cheaply.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Literal, Self, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, model_validator

from actors.settings import ActorsSettings, RolloutSettings
from buffer.trajectory.schema import FINISH_REASONS, TokenContract, trajectory_schema

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
FinishReason = Literal["eos", "max_length", "max_actions", "aborted"]
assert get_args(FinishReason) == FINISH_REASONS

REQUIRED_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
"""One process, because we access scheduler, sampler and weights directly. The V1 runner, because only it rolls a
request back when the scheduler shortens it, and samples with new noise afterwards."""

_schema_of = lru_cache(maxsize=8)(trajectory_schema)


@dataclass(frozen=True)
class EngineSettings:
    """One engine, in the process that creates it.

    model_dir: folder (or hub name) in Hugging Face format; weights in safetensors only, since pickles
        can execute code. `load_format="dummy"` reads only its config.json: the engine starts
        with random numbers and refuses requests until the first `load_weights`.
    max_length: prompt + text after all deletions, in tokens. A rollout may hold more actions than that.
    actors: number format, memory, threads, compilation, and requests that share one step.
    max_batched_tokens: budget of one step; longer prompts are split over steps. None: vLLM's default.
    num_kv_blocks: overrides the number of cache blocks that `kv_cache_gib` gives (tests of preemption).
    block_size: tokens per cache block; a multiple of 32 on CPU.
    """

    model_dir: str
    max_length: int = 1024
    actors: ActorsSettings = field(default_factory=ActorsSettings)
    seed: int = 0
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    max_batched_tokens: int | None = None
    num_kv_blocks: int | None = None
    block_size: int = 32
    enable_prefix_caching: bool = True

    @property
    def kv_cache_bytes(self) -> int:
        """Memory of the key-value cache, allocated at the start."""
        return int(self.actors.kv_cache_gib * 2**30)


def engine_environment(num_threads: int = 1) -> dict[str, str]:
    """Environment variables that must be set before the process of an engine imports vLLM."""
    return {
        **REQUIRED_ENVIRONMENT,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "OMP_NUM_THREADS": str(num_threads),
    }


class SamplingSettings(RolloutSettings):
    """How one request is sampled. `max_new_tokens` bounds the text *after deletions*, `max_actions` the actions.

    temperature: 0 is greedy.
    ban_deleted: a token that was deleted at a state is masked there. Inference only: training assumes that the
        distribution depends on the text alone.
    ban_eos: <eos> is never sampled, so only a limit ends the rollout.
    """

    temperature: float = Field(1.0, ge=0.0)
    ban_deleted: bool = False
    ban_eos: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.ban_deleted and not self.backspace:
            raise ValueError("ban_deleted has no effect without backspace: set backspace=True or ban_deleted=False")
        return self


@dataclass(frozen=True, eq=False)
class FinishedRollout:
    """The actions of the policy in one request. T actions, P prompt tokens.

    prompt_ids: [P]. actions: [T] ids as sampled, backspaces and deleted tokens included.
    logprobs: [T] of the distribution each action was sampled from (after masks, temperature and top-p); forced
        actions have 0. Greedy actions have the log-probability at temperature 1.
    policy_version: [T] version of the weights behind each action.
    """

    request_id: str
    prompt_ids: Int32
    actions: Int32
    logprobs: Float32
    policy_version: Int32
    finish_reason: FinishReason


def rollouts_to_batch(
    rollouts: Sequence[FinishedRollout],
    contract: TokenContract,
    *,
    task: str,
    actor: str,
    sampling: SamplingSettings,
    weights_fingerprint: str | None,
) -> pa.RecordBatch:
    """Rows of the trajectory schema, one per rollout, without Python work per token.

    rollouts: finished requests of one `sampling`; their request ids become trajectory ids.
    weights_fingerprint: of the newest version in the rollouts.
    """
    schema = _schema_of(contract)
    by_action = _offsets([rollout.actions for rollout in rollouts])
    columns = _equal_columns(contract, len(rollouts), task, actor, sampling, weights_fingerprint) | {
        "id": pa.array([rollout.request_id for rollout in rollouts], pa.string()),
        "prompt_ids": _lists([rollout.prompt_ids for rollout in rollouts], pa.int32()),
        "actions": _lists([rollout.actions for rollout in rollouts], pa.int32(), by_action),
        "logprobs": _lists([rollout.logprobs for rollout in rollouts], pa.float32(), by_action),
        "policy_version": _lists([rollout.policy_version for rollout in rollouts], pa.int32(), by_action),
        "finish_reason": pa.array([rollout.finish_reason for rollout in rollouts], pa.string()),
        "created_at": pa.repeat(pa.scalar(datetime.now(UTC), schema.field("created_at").type), len(rollouts)),
    }
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


@lru_cache(maxsize=64)  # batches of an actor are of the same task and size nearly always
def _equal_columns(
    contract: TokenContract, count: int, task: str, actor: str, sampling: SamplingSettings, fingerprint: str | None
) -> dict[str, pa.Array]:
    values = {
        "source": "policy",
        "task": task,
        "executed": None,  # no injected errors
        "weights_fingerprint": fingerprint,
        "sampling": {"temperature": sampling.temperature, "top_p": sampling.top_p, "backspace": sampling.backspace},
        "reward": None,
        "features": None,
        "actor": actor,
    }
    types = {name: _schema_of(contract).field(name).type for name in values}
    return {name: pa.repeat(pa.scalar(value, types[name]), count) for name, value in values.items()}


def _offsets(arrays: Sequence[npt.NDArray[np.generic]]) -> Int32:
    """[n + 1] offsets of the concatenated arrays."""
    offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
    np.cumsum(np.fromiter(map(len, arrays), np.int32, len(arrays)), out=offsets[1:])
    return offsets


def _lists(
    arrays: Sequence[npt.NDArray[np.generic]], value_type: pa.DataType, offsets: Int32 | None = None
) -> pa.ListArray:
    offsets = _offsets(arrays) if offsets is None else offsets
    # In a quarter of the time that `numpy.concatenate` takes. That arrays are buffers is declared from Python 3.12 on.
    values = b"".join(arrays)  # type: ignore[arg-type]
    count = int(offsets[-1])
    assert 8 * len(values) == count * value_type.bit_width, "one log-probability and one version per action"
    elements = pa.Array.from_buffers(value_type, count, [None, pa.py_buffer(values)], null_count=0)
    return pa.ListArray.from_arrays(pa.array(offsets), elements)
