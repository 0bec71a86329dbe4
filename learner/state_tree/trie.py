"""The trie of all texts that trajectories pass through: which of their tokens end the same text.

Nodes are identified without a loop over the trajectories: every (depth, token) pair has a pseudo-random 64-bit number,
and the key of a text is their sum modulo 2^64 (Zobrist hashing). An append adds its number, a backspace
subtracts the number of the token that it deletes, so the keys of all texts of a trajectory are one running sum. Equal
keys are then checked to have equal parents and equal tokens, which by induction makes the result exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from buffer.trajectory.replay import FLOOR, Int64, Replay, TrajectoryArrays

UInt64 = npt.NDArray[np.uint64]
Bool = npt.NDArray[np.bool_]

ROOT = -1
"""Stands for the parent of a prompt's first token."""


@dataclass(frozen=True)
class Trie:
    """The K distinct texts of a batch, as nodes in the order of their keys.

    token, depth: [K] last token of the text and its position, from 0. parent: [K] text before that token, or ROOT.
    first: [K] where the text occurs first, counting the prompts' tokens of all trajectories, then their appends.
    prompt_node: [L] of each trajectory's prompt. node_of_event: [A] text after each append (undefined for a
    backspace). pair_trajectory, pair_node: distinct (trajectory, node) pairs, ascending.
    """

    token: Int64
    depth: Int64
    parent: Int64
    first: Int64
    prompt_node: Int64
    node_of_event: Int64
    pair_trajectory: Int64
    pair_node: Int64

    @property
    def num_nodes(self) -> int:
        """K."""
        return len(self.first)


def build_trie(trajectories: TrajectoryArrays, played: Replay, backspace_id: int) -> Trie:
    """The distinct texts that the prompts and the appends of all trajectories complete."""
    prompt_lengths = np.diff(trajectories.prompt_offsets)
    prompt_trajectory = np.repeat(np.arange(trajectories.num_trajectories), prompt_lengths)
    num_prompt_tokens = len(trajectories.prompt_ids)
    prompt_depth = np.arange(num_prompt_tokens) - trajectories.prompt_offsets[:-1][prompt_trajectory]
    prompt_end = trajectories.prompt_offsets[1:] - 1

    is_append = trajectories.executed != backspace_id
    appends = np.flatnonzero(is_append)
    append_trajectory = played.trajectory[appends]
    # Elements are the prompt tokens of all trajectories, then their appends.
    element_of_event = num_prompt_tokens + np.cumsum(is_append) - 1
    before = played.state[appends]
    trajectory = np.concatenate([prompt_trajectory, append_trajectory])
    depth = np.concatenate([prompt_depth, prompt_lengths[append_trajectory] + played.depth[appends] - 1])
    token = np.concatenate([trajectories.prompt_ids, trajectories.executed[appends]]).astype(np.int64)
    parent = np.concatenate(
        [
            np.where(prompt_depth == 0, ROOT, np.arange(num_prompt_tokens) - 1),
            np.where(before == FLOOR, prompt_end[append_trajectory], element_of_event[before]),
        ]
    )

    numbers = _pair_numbers(depth, token)
    event_number = np.zeros(len(trajectories.actions), dtype=np.uint64)
    event_number[appends] = numbers[num_prompt_tokens:]
    backspaces = np.flatnonzero(~is_append)
    event_number[backspaces] = -event_number[played.state[backspaces]]  # modulo 2^64
    prompt_sums = _wrapping_cumsum(numbers[:num_prompt_tokens])
    event_sums = _wrapping_cumsum(event_number)
    prompt_keys = prompt_sums[1:] - prompt_sums[trajectories.prompt_offsets[:-1]][prompt_trajectory]
    append_keys = event_sums[1:][appends] - event_sums[trajectories.offsets[:-1]][append_trajectory]
    append_keys += prompt_keys[prompt_end][append_trajectory]
    keys, first, node = np.unique(np.concatenate([prompt_keys, append_keys]), return_index=True, return_inverse=True)
    node_of_parent = np.where(parent == ROOT, ROOT, node[parent])
    # By induction over the depth: equal parents and equal tokens for equal keys is equality of the texts.
    assert (node_of_parent == node_of_parent[first][node]).all(), "two texts share a 64-bit key"
    assert (token == token[first][node]).all(), "two texts share a 64-bit key"

    pairs = np.unique(trajectory * len(keys) + node)
    return Trie(
        token=token[first],
        depth=depth[first],
        parent=node_of_parent[first],
        first=first,
        prompt_node=node[prompt_end],
        node_of_event=node[element_of_event],
        pair_trajectory=pairs // len(keys),
        pair_node=pairs % len(keys),
    )


def preorder(trie: Trie) -> tuple[Int64, Int64]:
    """[K] preorder number of each node, over all trees; [K] by number: one beyond the node's last descendant.

    Trees, and children of a node, come in the order of their first elements. Sums over subtrees and over paths are
    found by pointer doubling: after i rounds a node knows of the relatives nearer than 2^i.
    """
    outside = trie.num_nodes  # stands above the roots, and above itself
    above = np.append(np.where(trie.parent == ROOT, outside, trie.parent), outside)
    jumps = [above]
    while (jumps[-1][:-1] != outside).any():
        jumps.append(jumps[-1][jumps[-1]])
    sizes = np.ones(outside + 1, dtype=np.int64)
    for jump in jumps[:-1]:
        sizes += np.bincount(jump[:-1], weights=sizes[:-1], minlength=outside + 1).astype(np.int64)
    # Nodes of the earlier siblings' subtrees: a running sum over siblings side by side.
    by_family = np.lexsort((trie.first, above[:-1]))
    family, family_sizes = above[by_family], sizes[by_family]
    before = np.cumsum(family_sizes) - family_sizes
    starts = np.flatnonzero(np.diff(family, prepend=-1))
    before -= np.repeat(before[starts], np.diff(starts, append=len(family)))
    steps = np.zeros(outside + 1, dtype=np.int64)
    steps[by_family] = 1 + before
    for jump in jumps[:-1]:
        steps = steps + steps[jump]
    number = steps[:-1] - 1
    subtree_end = np.empty_like(number)
    subtree_end[number] = number + sizes[:-1]
    return number, subtree_end


def _pair_numbers(depth: Int64, token: Int64) -> UInt64:
    """Pseudo-random 64-bit number of each (depth, token) pair: the SplitMix64 finalizer over the packed pair."""
    z = (depth.astype(np.uint64) << np.uint64(32)) + token.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _wrapping_cumsum(numbers: UInt64) -> UInt64:
    sums = np.zeros(len(numbers) + 1, dtype=np.uint64)
    np.cumsum(numbers, out=sums[1:])
    return sums
