"""The real shards of a buffer, each as slow as it is told to be, and the way of weights to the nodes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pyarrow as pa

from buffer.service.router import DrawRequest, Offer
from buffer.service.service import InsertReply, ReplayBufferService
from buffer.service.shard import shard_folder, shard_seed, shard_settings
from buffer.settings import BufferSettings
from buffer.store.counters import DrawResult
from launch.bench.buffer_load import CONTRACT
from launch.bench.scaling_times import StepTimes

EPOCH_S = 1_700_000_000.0
"""When the loop's clock stands at 0, for what counts from 1970."""


class SimulatedShard:
    """A `ReplayBufferService` behind calls that take time; it does one thing after the other."""

    def __init__(self, index: int, service: ReplayBufferService, times: StepTimes) -> None:
        self.index = index
        self.service = service
        self.busy_s = 0.0
        self._times = times
        self._turn = asyncio.Lock()

    async def insert(self, batch: pa.RecordBatch) -> InsertReply:
        """See `ReplayBufferService.insert`."""
        await self._called()
        await self._work(self._times.insert_s + batch.num_rows * self._times.insert_row_s)
        return await self.service.insert(batch)

    async def offer(self, request: DrawRequest) -> Offer:
        """See `ReplayBufferService.offer`."""
        await self._called()
        return await self.service.offer(request)

    async def take(self, request: DrawRequest, part: int) -> DrawResult | None:
        """See `ReplayBufferService.take`."""
        await self._called()
        drawn = await self.service.take(request, part)
        return None if drawn is None else await self._answered(drawn)

    async def wait_for_rows(self, inserts: int, timeout_s: float) -> bool:
        """See `ReplayBufferService.wait_for_rows`."""
        await self._called()
        return await self.service.wait_for_rows(inserts, timeout_s)

    async def wait_for_demand(self, timeout_s: float) -> bool:
        """See `ReplayBufferService.wait_for_demand`."""
        await self._called()
        return await self.service.wait_for_demand(timeout_s)

    async def _called(self) -> None:
        await asyncio.sleep(self._times.call_s)

    async def _answered(self, drawn: DrawResult) -> DrawResult:
        await self._work(self._times.draw_s + drawn.batch.num_rows * self._times.draw_row_s)
        return drawn

    async def _work(self, seconds: float) -> None:
        async with self._turn:
            await asyncio.sleep(seconds)
            self.busy_s += seconds


def open_shards(folder: Path, settings: BufferSettings, times: StepTimes, seed: int) -> list[SimulatedShard]:
    """Empty shards on the clock of the running loop.

    They store and draw as the settings say. What works in threads or for other programs is off: syncs, rewriting of
    segments, the archive, Arrow Flight.
    """
    loop = asyncio.get_running_loop()
    quiet = settings.model_copy(
        update={
            "fsync": "none",
            "fsync_interval_s": None,
            "compact_below": 0.0,
            "archive": None,
            "flight": settings.flight.model_copy(update={"enabled": False}),
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    return [
        SimulatedShard(
            index,
            ReplayBufferService(
                str(shard_folder(folder, index)),
                CONTRACT,
                shard_settings(quiet, index),
                shard_seed(seed, index),
                clock=lambda: EPOCH_S + loop.time(),
            ),
            times,
        )
        for index in range(settings.shards)
    ]


class WeightLink:
    """The learner's way to the nodes: it serves one after the other, and the actors of a node share what came."""

    def __init__(self, times: StepTimes) -> None:
        self._times = times
        self._turn = asyncio.Lock()
        self._sent: dict[tuple[int, int], asyncio.Task[None]] = {}

    async def fetch(self, version: int, actor_number: int) -> None:
        """Wait until the weights are on the actor's node."""
        key = (version, actor_number // self._times.actors_per_node)
        if key not in self._sent:
            self._sent[key] = asyncio.create_task(self._send())
        await asyncio.shield(self._sent[key])  # an actor that is ended takes the weights from no other

    async def _send(self) -> None:
        async with self._turn:
            await asyncio.sleep(self._times.send_weights_s)
