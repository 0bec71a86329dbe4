"""Which logs share a row of the state tree.

Wide rows share more nodes and waste fewer on padding, but attention costs N^2 per row. All rows are padded to
the widest one, so a forward pass over B rows of N nodes costs about B * N * (1 + N / BREAK_EVEN_WIDTH). The
width that makes this least depends on how much the prompts share, so a few widths are tried on every batch.
"""

from __future__ import annotations

import numpy as np

from buffer.replay import ActionLogs, Int64
from learner.state_trie import Trie

ROW_ALIGNMENT = 8
"""Rows are padded to a multiple of this: fused attention kernels want aligned masks."""

BREAK_EVEN_WIDTH = 512
"""Width at which attention costs as much as the rest of a layer: about 2 * hidden + 1.5 * feed-forward by
count of operations (480 measured for 96 and 256). Larger models have a larger one; the optimum is flat."""


def aligned(width: int) -> int:
    """The padded width of a row of `width` nodes."""
    return -(-width // ROW_ALIGNMENT) * ROW_ALIGNMENT


def assign_rows(logs: ActionLogs, trie: Trie, max_nodes_per_row: int) -> Int64:
    """[L] row of each log, numbered from 0, at the cheapest width that respects `max_nodes_per_row`.

    Logs of one prompt, and of prompts that begin alike, are neighbours in lexicographic order, so only
    neighbours are considered. The widths tried are the largest log times 1, 2, 4, ... and the maximum itself.
    """
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

    limits = []
    limit = int(np.diff(bounds).max())
    while limit < min(max_nodes_per_row, trie.num_nodes):
        limits.append(limit)
        limit *= 2
    limits.append(max_nodes_per_row)
    plans = [_fill_rows(previous_by_rank, limit) for limit in limits]
    best = min(plans, key=lambda plan: _cost(*plan))
    return best[0][rank]


def _fill_rows(previous_by_rank: list[Int64], limit: int) -> tuple[Int64, int]:
    """[L] row of each log in order, a new one where the next log would not fit; width of the widest row."""
    row_of_rank = np.empty(len(previous_by_rank), dtype=np.int64)
    row, row_start, row_nodes, widest = 0, 0, 0, 0
    for i, previous in enumerate(previous_by_rank):
        new = int(np.count_nonzero(previous < row_start))
        if row_nodes + new > limit and i > row_start:
            row, row_start, row_nodes = row + 1, i, 0
            new = len(previous)
        row_nodes += new
        widest = max(widest, row_nodes)
        row_of_rank[i] = row
    return row_of_rank, widest


def _cost(row_of_rank: Int64, widest: int) -> float:
    width = aligned(widest)
    return float((int(row_of_rank[-1]) + 1) * width * (1.0 + width / BREAK_EVEN_WIDTH))


def _order_by_prompt(logs: ActionLogs) -> Int64:
    """[L] logs in lexicographic order of their prompts, as fixed-width big-endian byte strings."""
    lengths = np.diff(logs.prompt_offsets)
    width = int(lengths.max())
    padded = np.zeros((logs.num_logs, width), dtype=">u4")
    padded[np.arange(width) < lengths[:, None]] = logs.prompt_ids.astype(np.uint32) + 1  # 0 is the end
    return np.argsort(padded.view(f"S{4 * width}").ravel(), kind="stable")
