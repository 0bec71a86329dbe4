"""Which part of a step's batch a rank evaluates: a pure function of the batch, so that the ranks need not talk."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa

from buffer.trajectory.replay import ActionLogs, Int64
from learner.objectives.base import LogCounts


def count_logs(batch: pa.RecordBatch) -> LogCounts:
    """Counts of the whole batch, whatever share of it is evaluated here."""
    ended = batch.column("finish_reason").to_numpy(zero_copy_only=False) == "eos"
    return LogCounts(
        logs=batch.num_rows,
        actions=int(ActionLogs.from_batch(batch).lengths.sum()),
        truncated_logs=batch.num_rows - int(np.count_nonzero(ended)),
    )


def share_of_rank(batch: pa.RecordBatch, rank: int, size: int, backspace_id: int) -> pa.RecordBatch:
    """The rows of `batch` that `rank` of `size` evaluates, in their order; each row goes to exactly one rank.

    Logs of one prompt stay together, since they share its nodes. The largest group goes first, each to the rank that
    has the fewest nodes so far (at worst 4/3 of the best balance). Shares may be empty.
    """
    if size == 1:
        return batch
    logs = ActionLogs.from_batch(batch)
    group = _groups_of_equal_prompts(logs)
    appended = np.concatenate([[0], np.cumsum(logs.realised != backspace_id)])
    num_answer_nodes = appended[logs.offsets[1:]] - appended[logs.offsets[:-1]]
    nodes = np.bincount(group, weights=num_answer_nodes).astype(np.int64)
    nodes[group] += np.diff(logs.prompt_offsets)  # not `np.add.at`: the prompt counts once per group
    load = np.zeros(size, dtype=np.int64)
    rank_of_group = np.empty(len(nodes), dtype=np.int64)
    for index in np.argsort(-nodes, kind="stable"):
        rank_of_group[index] = np.argmin(load)
        load[rank_of_group[index]] += nodes[index]
    return batch.take(pa.array(np.flatnonzero(rank_of_group[group] == rank)))


def _groups_of_equal_prompts(logs: ActionLogs) -> Int64:
    """[L] number of each log's prompt, counted from 0 in the order of first appearance."""
    numbers: dict[bytes, int] = {}
    bounds = logs.prompt_offsets
    return np.array(
        [numbers.setdefault(logs.prompt_ids[begin:end].tobytes(), len(numbers)) for begin, end in pairwise(bounds)],
        dtype=np.int64,
    )
