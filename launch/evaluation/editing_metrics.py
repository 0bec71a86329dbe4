"""What taking back costs, and whether it goes in circles: numbers of action logs that need no right answer.

backspace_rate           backspaces per action.
actions_per_final_token  actions spent for each token that remains, `<eos>` left out (a ratio of sums).
rewritten_rate           share of the backspaces after which the token that was taken back is written again at once.
longest_rewrite_run      mean over logs of the longest run of such rewrites: x < x < x has 2.
max_actions_rate         share of logs that ran into the bound on actions, which endless rewriting does.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from buffer.experts.ragged import Ragged
from buffer.trajectory.replay import ActionLogs, Replay, final_token_ids, surviving_events
from buffer.trajectory.schema import TokenContract
from launch.statistics import Bool, Estimate, Int64


def editing_metrics(
    batch: pa.RecordBatch, logs: ActionLogs, played: Replay, contract: TokenContract
) -> dict[str, Estimate]:
    """All numbers of the module's description. logs, played: of `batch`."""
    is_backspace = logs.actions == contract.backspace_id
    num_final = final_texts(logs, played, contract).lengths.astype(np.float64)
    rewritten, longest = rewrites(logs, played, contract.backspace_id)
    reasons = np.array(batch.column("finish_reason").to_pylist())
    return {
        "backspace_rate": Estimate.fraction(is_backspace, played.log, logs.num_logs),
        "actions_per_final_token": Estimate.ratio(logs.lengths.astype(np.float64), num_final),
        "rewritten_rate": Estimate.fraction(rewritten[is_backspace], played.log[is_backspace], logs.num_logs),
        "longest_rewrite_run": Estimate.mean(longest),
        "max_actions_rate": Estimate.fraction(reasons == "max_actions"),
    }


def planted_taken_back(
    logs: ActionLogs, played: Replay, contract: TokenContract, num_planted: int
) -> tuple[Bool, Estimate]:
    """[L] whether all tokens that were planted as a log's first actions are gone at the end; share of them that are.

    Raises:
        ValueError: a log is too short to hold them.
    """
    if (logs.lengths < num_planted).any():
        raise ValueError(f"a log is shorter than the {num_planted} tokens that were planted in it")
    planted = logs.offsets[:-1, None] + np.arange(num_planted)
    taken_back = ~surviving_events(logs, played, contract.backspace_id)[planted]
    share = Estimate.fraction(taken_back.ravel(), played.log[planted].ravel(), logs.num_logs)
    return np.logical_and.reduce(taken_back, axis=1), share


def final_texts(logs: ActionLogs, played: Replay, contract: TokenContract) -> Ragged:
    """What remains of each log, without `<eos>`."""
    offsets, ids = final_token_ids(logs, played, contract.backspace_id)
    is_text = ~np.isin(ids, contract.eos_ids)
    kept_before = np.concatenate([[0], np.cumsum(is_text)])
    return Ragged(kept_before[offsets], ids[is_text])


def rewrites(logs: ActionLogs, played: Replay, backspace_id: int) -> tuple[Bool, Int64]:
    """Backspaces that are followed at once by the token they took back.

    Returns:
        [A] whether each action is one; [L] longest run of them in each log, one every second action.
    """
    num_actions = len(logs.actions)
    rewritten = np.zeros(num_actions, dtype=np.bool_)
    longest = np.zeros(logs.num_logs, dtype=np.int64)
    is_backspace = logs.realised == backspace_id
    candidates = np.flatnonzero(is_backspace[:-1])
    candidates = candidates[played.log[candidates] == played.log[candidates + 1]]
    taken_back = logs.realised[played.state[candidates]]
    rewritten[candidates] = logs.realised[candidates + 1] == taken_back
    # In a run every second action is a rewrite, so the actions of even and odd index are looked at apart.
    for parity in (0, 1):
        events = np.arange(parity, num_actions, 2)
        hit, log = rewritten[events], played.log[events]
        position = np.arange(len(events))
        begins = np.concatenate([[True], log[1:] != log[:-1]])[: len(events)]
        breaks = np.where(hit, np.where(begins, position - 1, -1), position)
        last_break = np.maximum.accumulate(breaks)
        np.maximum.at(longest, log, position - last_break)
    return rewritten, longest
