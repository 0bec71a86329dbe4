"""One draw from all shards of a buffer, the same again when it is repeated.

One shard gives the draw at the first asking. Several are asked in two rounds:

    offer   what each has logged for this draw, and what it could add; nothing changes
    take    each logs its part and answers it

Every part is logged under the draw's key before it is answered, so a lost answer is asked for again, and a draw that an
interruption left with some of its parts logged is completed: the parts that are there stay, the rest is divided anew. A
shard whose offer no longer holds (its rows went stale in between) leaves the draw in just that state. A part may
therefore grow, also in a shard that has logged one, and no shard that lacks rows holds up a draw that others can serve.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from buffer.service.service import DrawTimeoutError
from buffer.service.shard_split import Offer, plan_parts
from buffer.store.consumption_log import DrawKey
from buffer.store.counters import DrawResult

WAIT_SLICE_S = 1.0
"""Longest wait in a shard for news; a wait that nobody needs any more ends by itself after so long."""


@dataclass(frozen=True)
class DrawRequest:
    """A draw that is asked for.

    count: rows, of all shards together. policy_version: newest version that the learner has published.
    first_version: of the weights that the stage's rollouts started with; older rows are of another stage.
    """

    key: DrawKey
    count: int
    policy_version: int
    first_version: int


class ShardClient(Protocol):
    """One shard, here or in another process; see `buffer.service.service.ReplayBufferService`."""

    async def draw(
        self, key: DrawKey, count: int, policy_version: int, timeout_s: float, first_version: int
    ) -> DrawResult:
        """Wait for a draw of which this shard gives all."""

    async def offer(self, key: DrawKey, count: int, policy_version: int, first_version: int) -> Offer:
        """What this shard can give to a draw of `count`."""

    async def take(
        self, key: DrawKey, part: int, count: int, policy_version: int, first_version: int
    ) -> DrawResult | None:
        """This shard's part of a draw of `count`; None where it cannot give so many any more."""

    async def wait_for_rows(self, inserts: int, timeout_s: float) -> bool:
        """Wait until the shard has taken more than `inserts` inserts; False where it has not in time."""

    async def shortage(self, count: int, source: str) -> str:
        """Why a draw of `count` is not served, for people."""


async def draw_from_shards(
    shards: Sequence[ShardClient], request: DrawRequest, timeout_s: float
) -> tuple[DrawResult | None, ...]:
    """The part of each shard, None where a shard has none; waits up to `timeout_s` for enough rows.

    Raises:
        DrawTimeoutError: too few rows came in time; the message says what each shard lacks.
        ValueError: the draw can never be served, or had another size before.
    """
    key, count = request.key, request.count
    versions = (request.policy_version, request.first_version)
    if len(shards) == 1:
        return (await shards[0].draw(key, count, versions[0], timeout_s, versions[1]),)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while True:
        offers = await asyncio.gather(*(shard.offer(key, count, *versions) for shard in shards))
        parts = plan_parts(count, offers)
        if parts is not None:
            taken = await asyncio.gather(
                *(
                    _take(shard, request, part) if part else _nothing()
                    for shard, part in zip(shards, parts, strict=True)
                )
            )
            if sum(0 if drawn is None else drawn.batch.num_rows for drawn in taken) == count:
                return tuple(taken)
        left_s = deadline - loop.time()
        if left_s <= 0:
            raise DrawTimeoutError(await _why_not(shards, request, timeout_s))
        if parts is None:
            await _wait_for_news(shards, offers, min(left_s, WAIT_SLICE_S))


async def _take(shard: ShardClient, request: DrawRequest, part: int) -> DrawResult | None:
    return await shard.take(request.key, part, request.count, request.policy_version, request.first_version)


async def _nothing() -> None:
    return None


async def _wait_for_news(shards: Sequence[ShardClient], offers: Sequence[Offer], timeout_s: float) -> None:
    """Until one shard has taken rows since its offer."""
    waits = [
        asyncio.ensure_future(shard.wait_for_rows(offer.inserts, timeout_s))
        for shard, offer in zip(shards, offers, strict=True)
    ]
    try:
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in done:
            wait.result()
    finally:
        for wait in waits:
            wait.cancel()


async def _why_not(shards: Sequence[ShardClient], request: DrawRequest, timeout_s: float) -> str:
    key, count = request.key, request.count
    reasons = await asyncio.gather(*(shard.shortage(count, key.source) for shard in shards))
    lines = "; ".join(f"shard {index}: {reason}" for index, reason in enumerate(reasons))
    return f"waited {timeout_s:g} s for {count} {key.source} trajectories from {len(shards)} shards: {lines}"
