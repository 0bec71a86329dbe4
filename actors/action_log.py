"""Finished requests as action logs, and action logs as rows of the trajectory schema."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actors.engine_settings import SamplingSettings
from buffer.schema import FINISH_REASONS, TokenContract, trajectory_schema

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
FinishReason = Literal["eos", "max_length", "max_actions", "aborted"]
assert get_args(FinishReason) == FINISH_REASONS

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
    schema = trajectory_schema(contract)
    sampled = {"temperature": sampling.temperature, "top_p": sampling.top_p, "floor_mask": True}
    columns = {
        "id": [log.request_id for log in logs],
        "source": ["policy"] * count,
        "task": [task] * count,
        "prompt_ids": _list_column([log.prompt_ids for log in logs], pa.int32()),
        "actions": _list_column([log.actions for log in logs], pa.int32()),
        "realised": [None] * count,  # nothing was injected
        "logprobs": _list_column([log.logprobs for log in logs], pa.float32()),
        "policy_version": _list_column([log.policy_version for log in logs], pa.int32()),
        "weights_fingerprint": [weights_fingerprint] * count,
        "finish_reason": [log.finish_reason for log in logs],
        "sampling": [sampled] * count,
        "reward": [None] * count,
        "features": [None] * count,
        "actor": [actor] * count,
        "created_at": [datetime.now(UTC)] * count,
    }
    return pa.RecordBatch.from_arrays(
        [
            column if isinstance(column, pa.Array) else pa.array(column, schema.field(name).type)
            for name, column in columns.items()
        ],
        schema=schema,
    )


def _list_column(arrays: Sequence[npt.NDArray[np.generic]], value_type: pa.DataType) -> pa.ListArray:
    offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    values = np.concatenate(arrays) if arrays else np.empty(0)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, value_type))
