"""A shard of the replay buffer that lives in a Ray actor, as `buffer.service.router` wants it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import ray

from buffer.service.shard import BufferLostError, Shard
from buffer.service.shard_split import Offer
from buffer.store.consumption_log import DrawKey
from buffer.store.counters import DrawResult

ANSWER_TIMEOUT_S = 120.0
"""Beyond the time that a call itself may wait: a shard that died needs some to come back, more with a large folder."""

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]

T = TypeVar("T")


class RayShard:
    """Every call is repeated by Ray where the shard dies before it answers and is restarted."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._unanswered: list[Awaitable[None]] = []

    async def draw(
        self, key: DrawKey, count: int, policy_version: int, timeout_s: float, first_version: int
    ) -> DrawResult:
        """See `ReplayBufferService.draw`.

        Raises:
            TimeoutError, ValueError, OSError: as it raises them. BufferLostError: its process is gone for good.
        """
        reference = self._shard.handle.draw.remote(key, count, policy_version, timeout_s, first_version)
        return await self._answer(reference, timeout_s)

    async def offer(self, key: DrawKey, count: int, policy_version: int, first_version: int) -> Offer:
        """See `ReplayBufferService.offer`; raises as `draw`."""
        return await self._answer(self._shard.handle.offer.remote(key, count, policy_version, first_version))

    async def take(
        self, key: DrawKey, part: int, count: int, policy_version: int, first_version: int
    ) -> DrawResult | None:
        """See `ReplayBufferService.take`; raises as `draw`."""
        return await self._answer(self._shard.handle.take.remote(key, part, count, policy_version, first_version))

    async def wait_for_rows(self, inserts: int, timeout_s: float) -> bool:
        """See `ReplayBufferService.wait_for_rows`; raises as `draw`."""
        return await self._answer(self._shard.handle.wait_for_rows.remote(inserts, timeout_s), timeout_s)

    async def shortage(self, count: int, source: str) -> str:
        """See `ReplayBufferService.shortage`; raises as `draw`."""
        return await self._answer(self._shard.handle.shortage.remote(count, source))

    def update_priorities(self, rows: Int64, priorities: Float32) -> None:
        """See `ReplayBufferService.update_priorities`; does not wait for it (`settle` does)."""
        self._unanswered.append(self._shard.handle.update_priorities.remote(rows, priorities))

    async def settle(self) -> None:
        """Wait for what was sent without waiting: a shard may take calls in another order. Raises as `draw`."""
        while self._unanswered:
            await self._answer(self._unanswered.pop())

    async def _answer(self, reference: Awaitable[T], waits_s: float = 0.0) -> T:
        limit_s = waits_s + ANSWER_TIMEOUT_S
        try:
            async with asyncio.timeout(limit_s) as timeout:
                return await reference
        except TimeoutError:
            if not timeout.expired():
                raise  # the shard's own, which says what it lacks
            raise TimeoutError(f"{self._shard.name} did not answer the learner within {limit_s:.0f} s") from None
        except ray.exceptions.RayActorError as error:
            raise BufferLostError(
                f"{self._shard.name} died ({str(error).splitlines()[0]}); what it accepted is on disk: resume the run"
            ) from None
