"""Where the learner's trajectories come from: the seam between the training loop and the data."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from buffer.service.router import DrawRequest, draw_from_shards
from buffer.service.shard import Shard
from buffer.store.consumption_log import DrawKey
from buffer.store.counters import DrawResult
from buffer.trajectory.staleness import VersionRange, staleness
from learner.batches.ray_shard import RayShard

POLL_S = 0.5

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


class StopRequestedError(Exception):
    """The run was asked to stop while the learner waited for data."""


class BatchSource(Protocol):
    """Trajectories for one step; `buffer.experts.stream.ExpertStream` is one, `BufferSource` the other."""

    def draw(self, count: int) -> pa.RecordBatch:
        """Exactly `count` trajectories."""


class BufferSource:
    """Draws from the replay buffer: from all of its shards, in proportion to what they hold."""

    def __init__(
        self,
        shards: Sequence[Shard],
        stage: str,
        source: str,
        timeout_s: float,
        newest_version: Callable[[], int],
        stop_requested: Callable[[], bool],
    ) -> None:
        """Args:
        shards: all of the run's buffer.
        stage: of training; each of its steps makes one draw.
        source: "policy" or "expert".
        newest_version: the newest published version at the time of a draw; staleness counts from it.
        stop_requested: asked while waiting.
        """
        self._shards = [RayShard(shard) for shard in shards]
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
            TimeoutError: the buffer could not give them in time; its message says what it holds, or which shard is
                silent.
            StopRequestedError: the run is to stop. BufferLostError: a shard died and did not come back.
        """
        key = DrawKey(self._stage, self._step, self._source)
        request = DrawRequest(key, count, self._newest_version(), self._first_version)
        self._drawn = asyncio.run(self._draw(request))
        drawn = [part for part in self._drawn if part is not None]
        self._step += 1
        self.staleness = np.concatenate(
            [staleness(part.policy_version, VersionRange.from_batch(part.batch).oldest) for part in drawn]
        )
        return drawn[0].batch if len(drawn) == 1 else pa.concat_batches([part.batch for part in drawn])

    def report_priorities(self, priorities: Float32) -> None:
        """Tell the shards how likely the rows of the newest draw are to be drawn again; returns without waiting.

        priorities: [n] in the order of the draw.
        """
        first = 0
        for shard, part in zip(self._shards, self._drawn, strict=True):
            if part is not None:
                shard.update_priorities(part.rows, priorities[first : first + len(part.rows)])
                first += len(part.rows)
        assert first == len(priorities), "one priority for each trajectory of the draw"

    async def _settled_draw(self, request: DrawRequest) -> tuple[DrawResult | None, ...]:
        """The parts of all shards, after they know the priorities of the draw before."""
        await asyncio.gather(*(shard.settle() for shard in self._shards))
        return await draw_from_shards(self._shards, request, self._timeout_s)

    async def _draw(self, request: DrawRequest) -> tuple[DrawResult | None, ...]:
        """See `_settled_draw`; asks now and then whether to stop."""
        drawing = asyncio.ensure_future(self._settled_draw(request))
        try:
            while not (await asyncio.wait([drawing], timeout=POLL_S))[0]:
                if self._stop_requested():
                    raise StopRequestedError
            return drawing.result()
        finally:
            drawing.cancel()
