"""Where the learner's trajectories come from: the seam between the training loop and the data.

Rank 0 alone draws. `SharedBatchSource` gives what it drew to all ranks, and lets them stop together.
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
from buffer.service.shard import DrawRequest
from buffer.store.shard import DrawKey, DrawResult
from buffer.trajectory.staleness import VersionRange, staleness
from learner.ranks import RankLostError, Ranks

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]

_BATCH, _STOP, _FAILURE = range(3)


class StopRequestedError(Exception):
    """The run was asked to stop while the learner waited for data."""


class BatchSource(Protocol):
    """Trajectories for one step; `buffer.experts.stream.ExpertStream` is one, `BufferSource` another."""

    def draw(self, count: int) -> pa.RecordBatch:
        """Exactly `count` trajectories."""


class BufferSource:
    """The draws of one stage from the replay buffer: from all of its shards, in proportion to what they hold."""

    def __init__(
        self,
        buffer: BufferClient,
        stage: str,
        source: str,
        timeout_s: float,
        newest_version: Callable[[], int],
        stop_requested: Callable[[], bool],
    ) -> None:
        """stage: each of its steps makes one draw. source: "policy" or "expert". newest_version: published at the time
        of a draw; staleness counts from it. stop_requested: asked while waiting."""
        self._buffer = buffer
        self._stage = stage
        self._source = source
        self._step = 0
        self._first_version = 0
        self._timeout_s = timeout_s
        self._newest_version = newest_version
        self._stop_requested = stop_requested
        self._drawn: tuple[DrawResult | None, ...] = ()
        self.staleness: Int64 = np.zeros(0, dtype=np.int64)
        """Of each trajectory of the newest draw, in published versions."""

    def seek(self, step: int, first_version: int) -> None:
        """Go on with the draw of a stage that has done `step` steps, and whose rollouts started with `first_version`:
        no older ones are drawn, since another stage made them.
        """
        self._step = step
        self._first_version = first_version

    def draw(self, count: int) -> pa.RecordBatch:
        """Wait for `count` trajectories.

        Raises:
            TimeoutError: the buffer could not give them in time; says what it holds, or which shard is silent.
            StopRequestedError: the run is to stop. BufferLostError: a shard died and did not come back.
        """
        key = DrawKey(self._stage, self._step, self._source)
        request = DrawRequest(key, count, self._newest_version(), self._first_version)
        self._drawn = self._buffer.draw(request, self._timeout_s, self._check_stop)
        drawn = [part for part in self._drawn if part is not None]
        self._step += 1
        self.staleness = np.concatenate(
            [staleness(part.policy_version, VersionRange.from_batch(part.batch).oldest) for part in drawn]
        )
        return drawn[0].batch if len(drawn) == 1 else pa.concat_batches([part.batch for part in drawn])

    def report_priorities(self, priorities: Float32) -> None:
        """Tell the buffer how likely the rows of the newest draw are to be drawn again; returns without waiting.

        priorities: [n] in the order of the draw.
        """
        self._buffer.update_priorities(self._drawn, priorities)

    def _check_stop(self) -> None:
        if self._stop_requested():
            raise StopRequestedError


class SharedBatchSource:
    """A batch source for every rank, around the one that only rank 0 has.

    Batches travel as Arrow streams; each comes after an announcement of its size, or of why there is none.
    """

    def __init__(
        self, ranks: Ranks, source: BatchSource | None, stop_requested: Callable[[], bool] = lambda: False
    ) -> None:
        """source: at rank 0; None elsewhere. stop_requested: asked at rank 0 before each draw."""
        assert (source is not None) == ranks.leads
        self._ranks = ranks
        self._source = source
        self._stop_requested = stop_requested

    def draw(self, count: int) -> pa.RecordBatch:
        """Exactly `count` trajectories, the same at every rank.

        Raises:
            StopRequestedError: the run is to stop; at every rank. RankLostError: rank 0 could not draw (rank 0 raises
            the reason itself), or cannot be reached.
        """
        if self._source is None:
            return self._receive()
        if self._ranks.size == 1:
            return self._draw(self._source, count)
        announcement, size_bytes = _FAILURE, 0
        try:
            batch = self._draw(self._source, count)
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, batch.schema) as stream:
                stream.write_batch(batch)
            payload = sink.getvalue()
            announcement, size_bytes = _BATCH, payload.size
        except StopRequestedError:
            announcement = _STOP
            raise
        finally:  # also where the draw fails: the others wait for this
            self._ranks.broadcast_numbers([announcement, size_bytes])
        # A copy: torch takes no read-only memory.
        self._ranks.broadcast_bytes(torch.from_numpy(np.frombuffer(payload, dtype=np.uint8).copy()))
        return batch

    def _draw(self, source: BatchSource, count: int) -> pa.RecordBatch:
        if self._stop_requested():
            raise StopRequestedError
        return source.draw(count)

    def _receive(self) -> pa.RecordBatch:
        announcement, size_bytes = self._ranks.broadcast_numbers([_FAILURE, 0])
        if announcement == _STOP:
            raise StopRequestedError
        if announcement == _FAILURE:
            raise RankLostError(f"learner rank {self._ranks.rank}: rank 0 could not draw a batch")
        payload = self._ranks.broadcast_bytes(torch.empty(size_bytes, dtype=torch.uint8))
        with pa.ipc.open_stream(pa.py_buffer(payload.numpy())) as stream:
            return stream.read_next_batch()


def priorities_of_draw(
    drawn: pa.RecordBatch, passes: Sequence[tuple[tuple[str, ...], Tensor]], ranks: Ranks
) -> Float32:
    """[n] the priority of each drawn trajectory, in the order of the draw; all ranks call this together.

    passes: of this rank, ids and [L] priorities of each. Every drawn log was in a pass of one rank.
    """
    own_ids = pa.array([name for ids, _ in passes for name in ids], pa.string())
    own = np.concatenate([np.zeros(0, dtype=np.float32), *(each.float().cpu().numpy() for _, each in passes)])
    place = pc.index_in(drawn.column("id"), value_set=own_ids).fill_null(-1).to_numpy()
    of_rows = np.where(place >= 0, np.append(own, np.float32(0.0))[place], np.float32(0.0))
    summed: Float32 = ranks.sum_vector(torch.from_numpy(of_rows)).numpy()
    return summed
