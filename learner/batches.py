"""From the replay buffer to the state trees of a rank.

Only rank 0 samples: `SharedBatchSource` broadcasts its batch to all ranks, and lets them stop together. A pure function
of the batch decides which part a rank evaluates, so the ranks need not communicate. A rank cuts its rows into
micro-batches and evaluates their state trees one after another. Priorities go back to the buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from buffer.service.client import BufferClient
from buffer.service.shard import SampleRequest
from buffer.store.shard import SampleKey, SampleResult
from buffer.trajectory.replay import Int64, TrajectoryArrays
from buffer.trajectory.staleness import VersionRange, staleness
from learner.objectives.base import BatchCounts
from learner.ranks import RankLostError, Ranks
from learner.state_tree.batch import TreeBatch, TreeSettings, build_tree_batch, checked_trajectories
from learner.state_tree.trie import Trie, build_trie

Float32 = npt.NDArray[np.float32]

_STOP, _FAILURE = -1, -2
"""Broadcast instead of the size of a batch."""


class StopRequestedError(Exception):
    """The run was asked to stop before the learner had the data of a step."""


class BatchSource(Protocol):
    """Trajectories for one step; `buffer.experts.stream.ExpertStream` is one, `BufferSource` another."""

    def sample(self, count: int) -> pa.RecordBatch:
        """Exactly `count` trajectories."""


class BufferSource:
    """Samples of one stage from the replay buffer: from all of its shards, in proportion to their live rows."""

    def __init__(
        self,
        buffer: BufferClient,
        stage: str,
        source: str,
        timeout_s: float,
        newest_version: Callable[[], int],
        stop_requested: Callable[[], bool],
    ) -> None:
        """source: "policy" or "expert". newest_version: newest published one when called; staleness counts from it.
        stop_requested: called while waiting."""
        self._buffer = buffer
        self._stage = stage
        self._source = source
        self._step = 0
        self._first_version = 0
        self._timeout_s = timeout_s
        self._newest_version = newest_version
        self._stop_requested = stop_requested
        self._drawn: tuple[SampleResult | None, ...] = ()
        self.staleness: Int64 = np.zeros(0, dtype=np.int64)
        """[n] staleness of each trajectory of the newest sample, in published versions."""

    def seek(self, step: int, first_version: int) -> None:
        """Set the position: the stage has done `step` steps, and its rollouts started with `first_version`."""
        self._step = step
        self._first_version = first_version

    def sample(self, count: int) -> pa.RecordBatch:
        """Wait for `count` trajectories; StopRequestedError if the run is to stop. As `BufferClient.sample` else."""
        key = SampleKey(self._stage, self._step, self._source)
        request = SampleRequest(key, count, self._newest_version(), self._first_version)
        self._drawn = self._buffer.sample(request, self._timeout_s, self._check_stop)
        drawn = [part for part in self._drawn if part is not None]
        self._step += 1
        self.staleness = np.concatenate(
            [staleness(part.policy_version, VersionRange.from_batch(part.batch).oldest) for part in drawn]
        )
        return drawn[0].batch if len(drawn) == 1 else pa.concat_batches([part.batch for part in drawn])

    def report_priorities(self, priorities: Float32) -> None:
        """Send the buffer the priorities [n] of the rows of the newest sample, in their order."""
        self._buffer.update_priorities(self._drawn, priorities)

    def _check_stop(self) -> None:
        if self._stop_requested():
            raise StopRequestedError


class SharedBatchSource:
    """A batch source for every rank, around the one that only rank 0 has. Rank 0 broadcasts the size of each batch, or
    why there is none, and then the batch as an Arrow stream."""

    def __init__(
        self, ranks: Ranks, source: BatchSource | None, stop_requested: Callable[[], bool] = lambda: False
    ) -> None:
        """source: at rank 0; None elsewhere. stop_requested: called at rank 0 before each sample."""
        assert (source is not None) == ranks.leads
        self._ranks = ranks
        self._source = source
        self._stop_requested = stop_requested

    def sample(self, count: int) -> pa.RecordBatch:
        """Exactly `count` trajectories, the same at every rank. StopRequestedError at every rank if the run has to
        stop; RankLostError if rank 0 could not sample (it raises the reason itself), or is lost."""
        if self._source is None:
            return self._receive()
        if self._ranks.size == 1:
            return self._sample(self._source, count)
        announcement = _FAILURE
        try:
            batch = self._sample(self._source, count)
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, batch.schema) as stream:
                stream.write_batch(batch)
            payload = sink.getvalue()
            announcement = payload.size
        except StopRequestedError:
            announcement = _STOP
            raise
        finally:  # also after an error: the others wait for this
            self._ranks.broadcast_numbers([announcement])
        # A copy: torch takes no read-only memory.
        self._ranks.broadcast_bytes(torch.from_numpy(np.frombuffer(payload, dtype=np.uint8).copy()))
        return batch

    def _sample(self, source: BatchSource, count: int) -> pa.RecordBatch:
        if self._stop_requested():
            raise StopRequestedError
        return source.sample(count)

    def _receive(self) -> pa.RecordBatch:
        (announcement,) = self._ranks.broadcast_numbers([_FAILURE])
        if announcement == _STOP:
            raise StopRequestedError
        if announcement == _FAILURE:
            raise RankLostError(f"learner rank {self._ranks.rank}: rank 0 could not sample a batch")
        payload = self._ranks.broadcast_bytes(torch.empty(announcement, dtype=torch.uint8))
        with pa.ipc.open_stream(pa.py_buffer(payload.numpy())) as stream:
            return stream.read_next_batch()


def count_batch(batch: pa.RecordBatch) -> BatchCounts:
    """Counts of the whole batch, of which this rank evaluates a part."""
    ended = batch.column("finish_reason").to_numpy(zero_copy_only=False) == "eos"
    return BatchCounts(
        trajectories=batch.num_rows,
        actions=int(TrajectoryArrays.from_batch(batch).lengths.sum()),
        truncated_trajectories=batch.num_rows - int(np.count_nonzero(ended)),
    )


def part_of_rank(batch: pa.RecordBatch, rank: int, size: int, backspace_id: int) -> pa.RecordBatch:
    """The rows of `batch` that `rank` of `size` evaluates, in their order; each row goes to exactly one rank.

    Trajectories of one prompt stay together, since they share its nodes. Groups are assigned in descending size, each
    to the rank with the fewest nodes so far (at worst 4/3 of the best balance). A part may be empty.
    """
    if size == 1:
        return batch
    trajectories = TrajectoryArrays.from_batch(batch)
    _, first, group = np.unique(_prompts(trajectories), return_index=True, return_inverse=True)
    group = np.argsort(np.argsort(first))[group]  # counted in the order of first appearance
    appended = np.concatenate([[0], np.cumsum(trajectories.executed != backspace_id)])
    num_answer_nodes = appended[trajectories.offsets[1:]] - appended[trajectories.offsets[:-1]]
    nodes = np.bincount(group, weights=num_answer_nodes).astype(np.int64)
    nodes[group] += np.diff(trajectories.prompt_offsets)  # not `np.add.at`: the prompt counts once per group
    load = np.zeros(size, dtype=np.int64)
    rank_of_group = np.empty(len(nodes), dtype=np.int64)
    for index in np.argsort(-nodes, kind="stable"):
        rank_of_group[index] = np.argmin(load)
        load[rank_of_group[index]] += nodes[index]
    return batch.take(pa.array(np.flatnonzero(rank_of_group[group] == rank)))


def priorities_of_sample(
    drawn: pa.RecordBatch, passes: Sequence[tuple[tuple[str, ...], Tensor]], ranks: Ranks
) -> Float32:
    """[n] the priority of each sampled trajectory, in the order of the sample; all ranks call this together.

    passes: ids and [L] priorities of this rank's passes. Every sampled trajectory was in a pass of one rank.
    """
    own_ids = pa.array([name for ids, _ in passes for name in ids], pa.string())
    own = np.concatenate([np.zeros(0, dtype=np.float32), *(each.float().cpu().numpy() for _, each in passes)])
    place = pc.index_in(drawn.column("id"), value_set=own_ids).fill_null(-1).to_numpy()
    of_rows = np.where(place >= 0, np.append(own, np.float32(0.0))[place], np.float32(0.0))
    summed: Float32 = ranks.sum_vector(torch.from_numpy(of_rows)).numpy()
    return summed


def build_micro_batches(batch: pa.RecordBatch, settings: TreeSettings) -> list[TreeBatch]:
    """State trees of a batch of trajectories; each trajectory is in exactly one of them.

    Trajectories whose prompts begin alike are kept together, so that they share nodes. A tree batch holds at most
    `max_tokens_per_micro_batch` nodes, but at least one trajectory; they are about equally large. Raises as
    `build_tree_batch`.
    """
    parts = [batch]
    num_elements = len(batch.column("actions").flatten()) + len(batch.column("prompt_ids").flatten())
    if num_elements > settings.max_tokens_per_micro_batch:
        trajectories, played, _ = checked_trajectories(batch, settings)
        members = _split(
            trajectories, build_trie(trajectories, played, settings.backspace_id), settings.max_tokens_per_micro_batch
        )
        parts = [batch.take(pa.array(rows)) for rows in members]
    return [build_tree_batch(part, settings) for part in parts]


def _split(trajectories: TrajectoryArrays, trie: Trie, max_nodes: int) -> list[Int64]:
    """Trajectories of each tree batch, ascending; neighbors in the lexicographic order of the prompts go together."""
    order = np.argsort(_prompts(trajectories), kind="stable")
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    pair_rank = rank[trie.pair_trajectory]
    # For every node of every trajectory: the last trajectory before it in the order that holds the node too.
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
    """Rank of the first trajectory of each tree batch, a new batch where the next trajectory would not fit."""
    begins, num_nodes = [0], 0
    for rank, previous in enumerate(previous_by_rank):
        new = int(np.count_nonzero(previous < begins[-1]))
        if num_nodes + new > max_nodes and rank > begins[-1]:
            begins.append(rank)
            num_nodes, new = 0, len(previous)
        num_nodes += new
    return begins


def _prompts(trajectories: TrajectoryArrays) -> npt.NDArray[np.bytes_]:
    """[L] prompts as fixed-width big-endian byte strings, which sort as the prompts do."""
    lengths = np.diff(trajectories.prompt_offsets)
    width = int(lengths.max())
    padded = np.zeros((trajectories.num_trajectories, width), dtype=">u4")
    padded[np.arange(width) < lengths[:, None]] = trajectories.prompt_ids.astype(np.uint32) + 1  # 0 is the end
    return padded.view(f"S{4 * width}").ravel()
