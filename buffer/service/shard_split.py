"""How one draw is divided over the shards of a buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Offer:
    """What one shard can give to one draw.

    logged: rows that it gave to this draw before, by its consumption log. live: live rows of the draw's source.
    available: rows that it could add now; at most those live rows that it has not logged, fewer where its limiter
        says so.
    inserts: inserts that it has taken; to be told when there are more (`wait_for_rows`).
    """

    logged: int
    live: int
    available: int
    inserts: int


def plan_parts(count: int, offers: Sequence[Offer]) -> list[int] | None:
    """Rows that each shard gives to a draw of `count`, those that it has logged included; None while they lack rows.

    What is logged stays: a draw that was given completely before is given so again, and one that an interruption left
    with some of its parts is completed by all shards.
    """
    missing = count - sum(offer.logged for offer in offers)
    assert missing >= 0, "a shard refuses a draw that had another size before"
    added = split(missing, [offer.live for offer in offers], [offer.available for offer in offers])
    if added is None:
        return None
    return [offer.logged + part for offer, part in zip(offers, added, strict=True)]


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
