"""How one draw of trajectories becomes state trees that are evaluated and freed one after another."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from buffer.trajectory.replay import ActionLogs, Int64
from learner.state_tree.batch import TreeBatch, TreeSettings, build_tree_batch, checked_logs
from learner.state_tree.trie import Trie, build_trie


def build_micro_batches(batch: pa.RecordBatch, settings: TreeSettings) -> list[TreeBatch]:
    """State trees of a batch of trajectories; each log is in exactly one of them.

    Logs whose prompts begin alike are kept together, so that they share nodes. A tree batch holds at most
    `max_nodes_per_batch` nodes, but at least one log; they are about equally large. Raises as `build_tree_batch`.
    """
    parts = [batch]
    num_elements = len(batch.column("actions").flatten()) + len(batch.column("prompt_ids").flatten())
    if num_elements > settings.max_nodes_per_batch:
        logs, played, _ = checked_logs(batch, settings)
        members = _split(logs, build_trie(logs, played, settings.backspace_id), settings.max_nodes_per_batch)
        parts = [batch.take(pa.array(rows)) for rows in members]
    return [build_tree_batch(part, settings) for part in parts]


def _split(logs: ActionLogs, trie: Trie, max_nodes: int) -> list[Int64]:
    """Logs of each tree batch, ascending; those at hand in lexicographic order of the prompts go together."""
    order = _order_by_prompt(logs)
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    pair_rank = rank[trie.pair_log]
    # For every node of every log: the last log before it in the order that holds the node too.
    by_node = np.lexsort((pair_rank, trie.pair_node))
    node, node_rank = trie.pair_node[by_node], pair_rank[by_node]
    previous = np.full(len(node), -1)
    previous[1:] = np.where(node[1:] == node[:-1], node_rank[:-1], -1)
    by_rank = np.argsort(node_rank, kind="stable")
    bounds = np.searchsorted(node_rank[by_rank], np.arange(len(order) + 1))
    previous_by_rank = np.split(previous[by_rank], bounds[1:-1])

    begins = _fill(previous_by_rank, max_nodes)
    # The same number of batches, but the last one not a remainder.
    evener = _fill(previous_by_rank, min(max_nodes, -(-trie.num_nodes // len(begins)) + int(np.diff(bounds).max())))
    if len(evener) <= len(begins):
        begins = evener
    return [np.sort(members) for members in np.split(order, begins[1:])]


def _fill(previous_by_rank: list[Int64], max_nodes: int) -> list[int]:
    """Rank of the first log of each tree batch, a new batch where the next log would not fit."""
    begins, num_nodes = [0], 0
    for rank, previous in enumerate(previous_by_rank):
        new = int(np.count_nonzero(previous < begins[-1]))
        if num_nodes + new > max_nodes and rank > begins[-1]:
            begins.append(rank)
            num_nodes, new = 0, len(previous)
        num_nodes += new
    return begins


def _order_by_prompt(logs: ActionLogs) -> Int64:
    """[L] logs in lexicographic order of their prompts, as fixed-width big-endian byte strings."""
    lengths = np.diff(logs.prompt_offsets)
    width = int(lengths.max())
    padded = np.zeros((logs.num_logs, width), dtype=">u4")
    padded[np.arange(width) < lengths[:, None]] = logs.prompt_ids.astype(np.uint32) + 1  # 0 is the end
    return np.argsort(padded.view(f"S{4 * width}").ravel(), kind="stable")
