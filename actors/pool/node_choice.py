"""Which node the next process of a role goes to: the rule of the plan, and of actors that come later.

Amounts of resources are whole numbers of Ray's smallest unit, so that an exact fit is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Placement = Literal["pack", "spread"]

UNITS = 10_000
"""Of a resource in 1.0: Ray rounds to this."""


@dataclass(frozen=True)
class NodeRoom:
    """What a node offers. free: amount of each resource, in units; own: processes of the role that it has."""

    node_id: str
    free: Mapping[str, int]
    own: int = 0

    def capacity(self, each: Mapping[str, int]) -> int:
        """Further processes that fit. each: what one needs, in units, positive amounts only."""
        return min(self.free.get(kind, 0) // amount for kind, amount in each.items())

    def with_more(self, each: Mapping[str, int], count: int = 1) -> NodeRoom:
        """After `count` more processes of the role have come."""
        left = {kind: amount - count * each.get(kind, 0) for kind, amount in self.free.items()}
        return replace(self, free=left, own=self.own + count)


def in_units(resources: Mapping[str, float]) -> dict[str, int]:
    """Amounts that are not 0, in units."""
    return {kind: round(amount * UNITS) for kind, amount in resources.items() if amount}


def choose_node(placement: Placement, each: Mapping[str, int], rooms: Sequence[NodeRoom]) -> int | None:
    """Index of the node for one more process; None where none has room. Of equals the first.

    pack: where most of the role are, else where most will fit. spread: where fewest are, of these where most will fit.
    """
    open_nodes = [index for index, room in enumerate(rooms) if room.capacity(each) > 0]
    if not open_nodes:
        return None
    sign = 1 if placement == "pack" else -1
    return max(open_nodes, key=lambda index: (sign * rooms[index].own, rooms[index].capacity(each), -index))
