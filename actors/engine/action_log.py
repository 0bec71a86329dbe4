"""Finished requests as action logs, and action logs as rows of the trajectory schema."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actors.engine.settings import SamplingSettings
from buffer.trajectory.schema import FINISH_REASONS, SAMPLING_TYPE, TokenContract, trajectory_schema

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
FinishReason = Literal["eos", "max_length", "max_actions", "aborted"]
assert get_args(FinishReason) == FINISH_REASONS

_schema_of = lru_cache(maxsize=8)(trajectory_schema)

STOP_MAX_ACTIONS = "max_actions"
"""vLLM's stop reason for the action limit; its finish reason is that of the length limit."""


@dataclass(frozen=True, eq=False)
class FinishedLog:
    """What the policy did in one request. T actions, P prompt tokens.

    prompt_ids: [P]. actions: [T] ids as sampled, backspaces and deleted tokens included.
    logprobs: [T] of the distribution each action was drawn from (after masks, temperature and top-p); planted
        actions have 0, they were certain. Greedy actions have the log-probability at temperature 1.
    policy_version: [T] version of the weights behind each action.
    num_planted: leading actions that were forced.
    """

    request_id: str
    prompt_ids: Int32
    actions: Int32
    logprobs: Float32
    policy_version: Int32
    finish_reason: FinishReason
    num_planted: int = 0


def finished_log(request_id: str, prompt_ids: Int32, num_planted: int, completion: CompletionOutput) -> FinishedLog:
    """Translate vLLM's finished completion, sampled with `logprobs=0` and `flat_logprobs=True`."""
    actions = np.asarray(completion.token_ids, dtype=np.int32)
    logprobs = np.asarray(completion.logprobs.logprobs, dtype=np.float32)
    assert len(logprobs) == len(actions), "one log-probability per action"
    versions = np.empty(len(actions), dtype=np.int32)
    for span in completion.weight_versions or ():
        versions[span.start : span.end] = int(span.version)
    return FinishedLog(
        request_id=request_id,
        prompt_ids=prompt_ids,
        actions=actions,
        logprobs=logprobs,
        policy_version=versions,
        finish_reason=_finish_reason(completion),
        num_planted=min(num_planted, len(actions)),
    )


def _finish_reason(completion: CompletionOutput) -> FinishReason:
    if completion.finish_reason == "length" and completion.stop_reason == STOP_MAX_ACTIONS:
        return "max_actions"
    reasons: dict[str, FinishReason] = {"stop": "eos", "length": "max_length", "abort": "aborted"}
    if completion.finish_reason not in reasons:
        raise RuntimeError(f"the engine ended a request with {completion.finish_reason!r}")
    return reasons[completion.finish_reason]


def logs_to_batch(
    logs: Sequence[FinishedLog],
    contract: TokenContract,
    *,
    task: str,
    actor: str,
    sampling: SamplingSettings,
    weights_fingerprint: str | None,
) -> pa.RecordBatch:
    """Rows of the trajectory schema, one per log, without Python work per token.

    Args:
        logs: finished requests of one `sampling`; their request ids become trajectory ids.
        weights_fingerprint: of the newest version in the logs.
    """
    count = len(logs)
    schema = _schema_of(contract)
    by_action = _offsets([log.actions for log in logs])
    columns = {
        "id": pa.array([log.request_id for log in logs], pa.string()),
        "source": _repeated("policy", count),
        "task": _repeated(task, count),
        "prompt_ids": _lists([log.prompt_ids for log in logs], pa.int32()),
        "actions": _lists([log.actions for log in logs], pa.int32(), by_action),
        "realised": pa.nulls(count, schema.field("realised").type),  # nothing was injected
        "logprobs": _lists([log.logprobs for log in logs], pa.float32(), by_action),
        "policy_version": _lists([log.policy_version for log in logs], pa.int32(), by_action),
        "weights_fingerprint": _repeated(weights_fingerprint, count),
        "finish_reason": pa.array([log.finish_reason for log in logs], pa.string()),
        "sampling": _repeated_sampling(sampling.temperature, sampling.top_p, sampling.backspace, count),
        "reward": pa.nulls(count, schema.field("reward").type),
        "features": pa.nulls(count, schema.field("features").type),
        "actor": _repeated(actor, count),
        "created_at": pa.repeat(pa.scalar(datetime.now(UTC), schema.field("created_at").type), count),
    }
    return pa.RecordBatch.from_arrays(list(columns.values()), schema=schema)


@lru_cache(maxsize=64)  # batches of an actor are of the same task and size nearly always
def _repeated(value: str | None, count: int) -> pa.StringArray:
    return pa.repeat(pa.scalar(value, pa.string()), count)


@lru_cache(maxsize=64)
def _repeated_sampling(temperature: float, top_p: float, floor_mask: bool, count: int) -> pa.StructArray:
    value = {"temperature": temperature, "top_p": top_p, "floor_mask": floor_mask}
    return pa.repeat(pa.scalar(value, SAMPLING_TYPE), count)


def _offsets(arrays: Sequence[npt.NDArray[np.generic]]) -> Int32:
    """[n + 1] where each array begins when they are joined, and where the last one ends."""
    offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
    np.cumsum(np.fromiter(map(len, arrays), np.int32, len(arrays)), out=offsets[1:])
    return offsets


def _lists(
    arrays: Sequence[npt.NDArray[np.generic]], value_type: pa.DataType, offsets: Int32 | None = None
) -> pa.ListArray:
    """offsets: of the arrays, if known already."""
    offsets = _offsets(arrays) if offsets is None else offsets
    # In a quarter of the time that `numpy.concatenate` takes. That arrays are buffers is declared from Python 3.12 on.
    values = b"".join(arrays)  # type: ignore[arg-type]
    count = int(offsets[-1])
    assert 8 * len(values) == count * value_type.bit_width, "one log-probability and one version per action"
    elements = pa.Array.from_buffers(value_type, count, [None, pa.py_buffer(values)], null_count=0)
    return pa.ListArray.from_arrays(pa.array(offsets), elements)
