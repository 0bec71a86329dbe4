"""A learner that does not train: it draws, takes as long as a step takes, and publishes on its schedule."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np

from buffer.service.router import DrawRequest, draw_from_shards
from buffer.store.consumption_log import DrawKey
from buffer.trajectory.staleness import VersionRange, staleness
from launch.bench.scaling_shards import SimulatedShard
from launch.bench.scaling_times import StepTimes
from learner.settings.stages import LearnerSettings, StageSettings


class SimulatedLearner:
    """The loop of `learner.worker.LearnerWorker`, without model and ranks but with their times."""

    def __init__(
        self,
        stage: StageSettings,
        settings: LearnerSettings,
        times: StepTimes,
        shards: Sequence[SimulatedShard],
        announce: Callable[[int], None],
        ranks: int,
    ) -> None:
        """announce: tells the pool a new version of the weights."""
        self._stage = stage
        self._settings = settings
        self._times = times
        self._shards = shards
        self._announce = announce
        self._ranks = ranks
        self._version = -1
        self.steps = 0
        """Done."""
        self.step_s = self.publish_s = self.wait_s = 0.0
        """Time spent in steps, in publications, in waits for the buffer."""
        self.staleness_sum = self.staleness_max = 0
        """Over all rows drawn, in published versions."""

    async def publish(self) -> None:
        """Publish the weights of now."""
        await asyncio.sleep(self._times.publish_s)
        self.publish_s += self._times.publish_s
        self._version += 1
        self._announce(self._version)

    async def train_step(self) -> None:
        """One step and what follows it.

        Raises:
            DrawTimeoutError: the buffer could not serve the draw within `data_timeout_s`.
        """
        stage, times = self._stage, self._times
        await self._draw(stage.rollout_batch_size)
        seconds = times.step_s(stage.batch_size + stage.rollout_batch_size, self._ranks)
        await asyncio.sleep(seconds)
        self.step_s += seconds
        self.steps += 1
        if self.steps % stage.publish_every_steps == 0:
            await self.publish()
        if self.steps % self._settings.checkpoint_every_steps == 0:
            for shard in self._shards:
                await shard.service.checkpointed(stage.name, self.steps)

    async def _draw(self, count: int) -> None:
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        key = DrawKey(self._stage.name, self.steps, "policy")
        request = DrawRequest(key, count, self._version, first_version=0)
        parts = await draw_from_shards(self._shards, request, self._settings.data_timeout_s)
        self.wait_s += loop.time() - started_s
        behind = np.concatenate(
            [
                staleness(part.policy_version, VersionRange.from_batch(part.batch).oldest)
                for part in parts
                if part is not None
            ]
        )
        assert len(behind) == count
        self.staleness_sum += int(behind.sum())
        self.staleness_max = max(self.staleness_max, int(behind.max()))
