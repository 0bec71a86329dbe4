"""The states of trajectories as a tree, so that one forward pass evaluates every distinct state once.

A node is an appended token; the text of a node is the path from the root to it, and a state is a node.
`<backspace>` adds no node: it moves to the parent. A node attends to its ancestors and itself, its position is its
depth, so its logits equal those of its text run alone. Texts that occur twice (a token retyped after a deletion, a
prompt shared by several trajectories, a prompt that begins another one) are one node.

Nodes are numbered in preorder (a node, then its subtrees one after another), over all trees of the batch: node j is
an ancestor of i, or i itself, exactly if j <= i < subtree_end[j]. No N x N mask is needed to say so.

Legend: L trajectories, A actions over all of them, N nodes (padded), M distinct states.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import xxhash
from torch import Tensor

from buffer.trajectory.replay import FLOOR, Int64, Replay, TrajectoryArrays, replay
from buffer.trajectory.schema import Behavior
from learner.state_tree.trie import Bool, build_trie, preorder

NODE_ALIGNMENT = 8
"""A batch is padded to a multiple of this many nodes: matrix kernels are slower at odd sizes."""


@dataclass(frozen=True)
class _Columns:
    """Tensors, and tuples, with one row for each of the same things."""

    def to(self, device: torch.device | str) -> Self:
        """The same with its tensors on `device`."""
        return replace(self, **{name: each.to(device) for name, each in vars(self).items() if isinstance(each, Tensor)})

    def emptied(self) -> Self:
        """The same without a row."""
        return replace(self, **{name: each[:0] for name, each in vars(self).items()})


@dataclass(frozen=True)
class Nodes(_Columns):
    """The distinct texts, each by its last token.

    token_ids: [N]. positions: [N] depth of the token in its text, from 0.
    subtree_end: [N] one beyond the last descendant of the node; a padded node is a tree of its own.
    states: [M] nodes that are a state of some trajectory, ascending.
    """

    token_ids: Tensor
    positions: Tensor
    subtree_end: Tensor
    states: Tensor


@dataclass(frozen=True)
class Actions(_Columns):
    """The actions of all trajectories, one trajectory after another.

    trajectory, time: [A] index of the action's trajectory, and of the action in it. label: [A] id.
    state, next_state: [A] text before and after the action (of the *executed* token), as an index into `Nodes.states`.
    backspace_masked, next_backspace_masked: [A] whether backspace is no action before and after this one: only the
        prompt is left, or the sampler never offered it.
    behavior_log_prob, behavior_version, behavior_temperature: [A] what the policy that acted said of the action (see
        `buffer.trajectory.behavior`). temperatures: distinct values of behavior_temperature, but 0 and 1.
    """

    trajectory: Tensor
    time: Tensor
    label: Tensor
    state: Tensor
    next_state: Tensor
    backspace_masked: Tensor
    next_backspace_masked: Tensor
    behavior_log_prob: Tensor
    behavior_version: Tensor
    behavior_temperature: Tensor
    temperatures: tuple[float, ...]


@dataclass(frozen=True)
class Trajectories(_Columns):
    """What holds for a whole trajectory.

    ids: [L]. length: [L] actions. truncated: [L] True unless it ended with `<eos>`.
    start, final: [L] text of the prompt, and the last text, as an index into `Nodes.states`.
    final_backspace_masked: [L] as in `Actions`, at the end.
    is_expert: [L] whether it is of the data.
    reward: [L] as stored, nan where there is none. features: [L, F] as stored; F is 0 where no trajectory has any.
    context: [L] number of the prompt, equal where prompts are; below 2^52, so that float64 holds it.
    """

    ids: tuple[str, ...]
    length: Tensor
    truncated: Tensor
    start: Tensor
    final: Tensor
    final_backspace_masked: Tensor
    is_expert: Tensor
    reward: Tensor
    features: Tensor
    context: Tensor

    def sum_of_actions(self, per_action: Tensor) -> Tensor:
        """[L] sums of a [A] tensor over the actions of each trajectory."""
        # Unlike `index_add` it has one order of summation on an accelerator too. `unsafe` leaves out a check of the
        # lengths, which fails where there is no trajectory.
        return torch.segment_reduce(per_action, "sum", lengths=self.length, initial=0, unsafe=True)


@dataclass(frozen=True)
class TreeBatch:
    """Trajectories packed into trees, in the order of the batch. num_nodes: without padding. num_nodes_unshared: nodes
    if no two trajectories shared any."""

    nodes: Nodes
    actions: Actions
    trajectories: Trajectories
    num_nodes: int
    num_nodes_unshared: int

    @property
    def num_trajectories(self) -> int:
        """L."""
        return len(self.trajectories.ids)

    @property
    def num_actions(self) -> int:
        """A."""
        return len(self.actions.label)

    @property
    def num_padded_nodes(self) -> int:
        """N."""
        return len(self.nodes.token_ids)

    @property
    def attention_mask(self) -> Tensor:
        """[N, N] True where the query (first axis) sees the key: ancestors and itself. Quadratic in N."""
        node = torch.arange(self.num_padded_nodes, device=self.nodes.token_ids.device)
        return (node <= node[:, None]) & (self.nodes.subtree_end > node[:, None])

    def answer_nodes(self) -> tuple[Tensor, Tensor]:
        """[K] nodes of answers, ascending, and [K] an action that wrote each: all that did acted on the same text."""
        before, after = self.nodes.states[self.actions.state], self.nodes.states[self.actions.next_state]
        wrote = (self.nodes.positions[after] > self.nodes.positions[before]).nonzero().flatten()
        writer = torch.full_like(self.nodes.token_ids, self.num_actions)
        writer.scatter_reduce_(0, after[wrote], wrote, "amin")
        nodes = (writer < self.num_actions).nonzero().flatten()
        return nodes, writer[nodes]

    def to(self, device: torch.device | str) -> TreeBatch:
        """The same batch with its tensors on `device`."""
        parts = self.nodes.to(device), self.actions.to(device), self.trajectories.to(device)
        return TreeBatch(*parts, self.num_nodes, self.num_nodes_unshared)

    def without_trajectories(self) -> TreeBatch:
        """The same nodes with no trajectory on them: sums over actions or trajectories are 0, and so their gradient."""
        return TreeBatch(self.nodes, self.actions.emptied(), self.trajectories.emptied(), 0, 0)


@dataclass(frozen=True)
class TreeSettings:
    """How trajectories become state trees.

    max_tokens_per_micro_batch: see `learner.batches`. max_positions: longest text, in tokens.
    offers_backspace: False = backspace is no action in any state, whatever a trajectory says of itself.
    """

    backspace_id: int
    eos_id: int
    max_tokens_per_micro_batch: int
    max_positions: int
    offers_backspace: bool = True
    other_eos_ids: tuple[int, ...] = ()


def build_tree_batch(batch: pa.RecordBatch, settings: TreeSettings) -> TreeBatch:
    """Pack the trajectories of `batch` (schema of `buffer.trajectory.schema`) into one tree per distinct first token.
    Raises as `checked_trajectories`; ValueError, too, where some trajectories have features that others lack."""
    trajectories, played, truncated = checked_trajectories(batch, settings)
    trie = build_trie(trajectories, played, settings.backspace_id)
    number, subtree_end = preorder(trie)
    width = -(-trie.num_nodes // NODE_ALIGNMENT) * NODE_ALIGNMENT
    floor_node, appended_node = number[trie.prompt_node], number[trie.node_of_event]

    def by_number(per_node: Int64) -> Tensor:
        padded = np.zeros(width, dtype=np.int64)
        padded[number] = per_node
        return torch.from_numpy(padded)

    def nodes_of(events: Int64) -> Int64:
        return np.where(events == FLOOR, floor_node[played.trajectory], appended_node[events])

    state, next_state = nodes_of(played.state), nodes_of(played.next_state)
    final, final_at_floor = floor_node.copy(), np.ones(trajectories.num_trajectories, dtype=np.bool_)
    acted = trajectories.lengths > 0
    last_action = trajectories.offsets[1:][acted] - 1
    final[acted] = next_state[last_action]
    final_at_floor[acted] = played.next_state[last_action] == FLOOR
    states = np.unique(np.concatenate([floor_node, state, next_state]))
    behavior = Behavior.from_batch(batch)
    never_offered = ~(behavior.offers_backspace & settings.offers_backspace)
    tensor = torch.from_numpy

    def index_of(nodes: Int64) -> Tensor:
        return tensor(np.searchsorted(states, nodes))

    return TreeBatch(
        nodes=Nodes(
            token_ids=by_number(trie.token),
            positions=by_number(trie.depth),
            subtree_end=tensor(np.concatenate([subtree_end, np.arange(trie.num_nodes, width) + 1])),
            states=tensor(states),
        ),
        actions=Actions(
            trajectory=tensor(played.trajectory),
            time=tensor(played.time),
            label=tensor(trajectories.actions.astype(np.int64)),
            state=index_of(state),
            next_state=index_of(next_state),
            backspace_masked=tensor((played.state == FLOOR) | never_offered[played.trajectory]),
            next_backspace_masked=tensor((played.next_state == FLOOR) | never_offered[played.trajectory]),
            behavior_log_prob=tensor(behavior.log_prob),
            behavior_version=tensor(behavior.version),
            behavior_temperature=tensor(behavior.temperature),
            temperatures=tuple(value for value in np.unique(behavior.temperature).tolist() if value not in (0.0, 1.0)),
        ),
        trajectories=Trajectories(
            ids=tuple(batch.column("id").to_pylist()),
            length=tensor(trajectories.lengths),
            truncated=tensor(truncated),
            start=index_of(floor_node),
            final=index_of(final),
            final_backspace_masked=tensor(final_at_floor | never_offered),
            is_expert=tensor(_column_equals(batch, "source", "expert")),
            reward=tensor(batch.column("reward").to_numpy(zero_copy_only=False).astype(np.float32)),
            features=_features(batch.column("features")),
            context=torch.tensor(
                [_context(prompt) for prompt in np.split(trajectories.prompt_ids, trajectories.prompt_offsets[1:-1])]
            ),
        ),
        num_nodes=trie.num_nodes,
        num_nodes_unshared=len(trie.pair_trajectory),
    )


def _features(column: pa.ListArray) -> Tensor:
    """[L, F]; every trajectory has as many (else ValueError), or none has any."""
    numbers = column.flatten().to_numpy(zero_copy_only=False)
    width = len(numbers) // len(column)
    lengths = column.value_lengths().fill_null(0).to_numpy()
    if (lengths != width).any():
        raise ValueError(f"trajectories of one batch have between {lengths.min()} and {lengths.max()} features")
    return torch.from_numpy(numbers.reshape(len(column), width).astype(np.float32))


def _context(prompt: npt.NDArray[np.int32]) -> int:
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(prompt).tobytes()) >> 12


def checked_trajectories(batch: pa.RecordBatch, settings: TreeSettings) -> tuple[TrajectoryArrays, Replay, Bool]:
    """The trajectories of a batch, their states, and [L] whether each is truncated (did not end with `<eos>`).
    ValueError: the batch or a prompt is empty, a text is longer than `max_positions`, or a trajectory deletes a token
    at the floor or acts after `<eos>`."""
    trajectories = TrajectoryArrays.from_batch(batch)
    if trajectories.num_trajectories == 0:
        raise ValueError("cannot build a state tree from a batch without trajectories")
    played = replay(trajectories, settings.backspace_id)
    truncated = ~_column_equals(batch, "finish_reason", "eos")
    prompt_lengths = np.diff(trajectories.prompt_offsets)
    if not prompt_lengths.all():
        raise ValueError(
            f"trajectory {int(np.argmin(prompt_lengths))} has an empty prompt; start it with the <bos> token, so "
            "that the first action has a state"
        )
    longest = prompt_lengths.copy()
    np.maximum.at(longest, played.trajectory, prompt_lengths[played.trajectory] + played.depth)
    if longest.max() > settings.max_positions:
        raise ValueError(
            f"trajectory {int(np.argmax(longest))} has a text of {int(longest.max())} tokens, more than the "
            f"{settings.max_positions} positions of the model; lower the prompt or answer length"
        )
    is_eos = np.isin(trajectories.executed, (settings.eos_id, *settings.other_eos_ids))
    is_last = played.time == trajectories.lengths[played.trajectory] - 1
    at_floor = (trajectories.actions == settings.backspace_id) & (played.state == FLOOR)
    num_wrong = np.bincount(played.trajectory[at_floor | (is_eos & ~is_last)], minlength=trajectories.num_trajectories)
    ends = np.bincount(played.trajectory[is_eos & is_last], minlength=trajectories.num_trajectories)
    bad = (num_wrong > 0) | (ends == truncated)
    if bad.any():
        raise ValueError(
            f"trajectory {int(np.argmax(bad))} takes a token back at the floor (the end of its prompt), or "
            "`<eos>` is not the last action exactly where finish_reason is `eos`"
        )
    return trajectories, played, truncated


def _column_equals(batch: pa.RecordBatch, name: str, value: str) -> Bool:
    return np.asarray(batch.column(name).to_numpy(zero_copy_only=False) == value, dtype=np.bool_)
