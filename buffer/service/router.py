"""One draw from all shards of a buffer, the same again when it is repeated.

The shards are asked in two rounds:

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

from buffer.store.results import DrawKey, DrawResult

WAIT_SLICE_S = 1.0
"""Longest wait in a shard for news; a wait that nobody needs any more ends by itself after so long."""


class DrawTimeoutError(TimeoutError):
    """The buffer could not serve a draw in time; the message says what it lacked and whom it waited for."""


@dataclass(frozen=True)
class DrawRequest:
    """A draw that is asked for.

    count: rows, of all shards together. policy_version: newest version that the learner has published.
    first_version: of the weights that the stage's rollouts started with; older rows are of another stage.
    """

    key: DrawKey
    count: int
    policy_version: int
    first_version: int = 0


@dataclass(frozen=True)
class Offer:
    """What one shard can give to one draw.

    logged: rows that it gave to this draw before, by its catalog. live: live rows of the draw's source.
    available: rows that it could add now; at most those live rows that it has not logged, fewer where its limiter
        says so.
    inserts: inserts that it has taken; to be told when there are more (`wait_for_rows`).
    shortage: why it cannot give all of the draw, for people.
    """

    logged: int
    live: int
    available: int
    inserts: int
    shortage: str = ""


class ShardClient(Protocol):
    """One shard: `buffer.service.shard.Shard` in another process, or the service itself."""

    async def offer(self, request: DrawRequest) -> Offer:
        """See `ReplayBufferService.offer`."""

    async def take(self, request: DrawRequest, part: int) -> DrawResult | None:
        """See `ReplayBufferService.take`."""

    async def wait_for_rows(self, inserts: int, timeout_s: float) -> bool:
        """See `ReplayBufferService.wait_for_rows`."""


async def draw_from_shards(
    shards: Sequence[ShardClient], request: DrawRequest, timeout_s: float
) -> tuple[DrawResult | None, ...]:
    """The part of each shard, None where a shard has none; waits up to `timeout_s` for enough rows.

    Raises:
        DrawTimeoutError: too few rows came in time; the message says what each shard lacks.
        ValueError: the draw can never be served, or had another size before.
    """
    if len(shards) == 1 and (drawn := await shards[0].take(request, request.count)) is not None:
        return (drawn,)  # in one call, where nothing is to be divided
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while True:
        offers = await asyncio.gather(*(shard.offer(request) for shard in shards))
        parts = plan_parts(request.count, offers)
        if parts is not None:
            taken = await asyncio.gather(*map(_take, shards, [request] * len(shards), parts))
            if sum(0 if drawn is None else drawn.batch.num_rows for drawn in taken) == request.count:
                return tuple(taken)
        left_s = deadline - loop.time()
        if left_s <= 0:
            raise DrawTimeoutError(
                f"waited {timeout_s:g} s for {request.count} {request.key.source} trajectories{_shortages(offers)}"
            )
        if parts is None:
            await _wait_for_news(shards, offers, min(left_s, WAIT_SLICE_S))


async def _take(shard: ShardClient, request: DrawRequest, part: int) -> DrawResult | None:
    return await shard.take(request, part) if part else None


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


def _shortages(offers: Sequence[Offer]) -> str:
    if len(offers) == 1:
        return f": {offers[0].shortage}"
    lines = "; ".join(f"shard {index}: {offer.shortage}" for index, offer in enumerate(offers))
    return f" from {len(offers)} shards: {lines}"


def plan_parts(count: int, offers: Sequence[Offer]) -> list[int] | None:
    """Rows that each shard gives to a draw of `count`, those that it has logged included; None while they lack rows.

    What is logged stays: a draw that was given completely before is given so again, and one that an interruption left
    with some of its parts is completed by all shards.
    """
    missing = count - sum(offer.logged for offer in offers)
    assert missing >= 0, "a shard refuses a draw that had another size before"
    added = split(missing, [offer.live for offer in offers], [offer.available for offer in offers])
    return None if added is None else [offer.logged + part for offer, part in zip(offers, added, strict=True)]


def split(count: int, weights: Sequence[int], limits: Sequence[int]) -> list[int] | None:
    """Divide `count` in proportion to `weights`, no part beyond its limit; None where the limits do not allow it.

    Method of largest remainders, in whole numbers and with ties to the first, so that equal input gives equal parts
    everywhere. What a limited part cannot take is divided among the others in the same way.
    """
    assert all(limit <= weight for limit, weight in zip(limits, weights, strict=True)), "no part without weight"
    if sum(limits) < count:
        return None
    parts = [0] * len(weights)
    free = [index for index, limit in enumerate(limits) if limit > 0]
    while True:
        missing = count - sum(parts)
        total = sum(weights[index] for index in free)
        if missing == 0 or total == 0:
            return parts
        full = [index for index in free if missing * weights[index] >= limits[index] * total]
        if not full:
            break
        for index in full:
            parts[index] = limits[index]
        free = [index for index in free if index not in full]
    for index in free:
        parts[index] = missing * weights[index] // total
    by_remainder = sorted(free, key=lambda index: (-(missing * weights[index] % total), index))
    for index in by_remainder[: count - sum(parts)]:
        parts[index] += 1
    return parts
