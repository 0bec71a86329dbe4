"""Capacity for a run on a live cluster: one placement group of Ray for each role.

Ray chooses the nodes, all of a group at once, and Ray's autoscaler adds nodes for a group that waits. The learner runs
in its group. That of the actors only keeps their capacity until the pool makes them: an actor belongs to no group, so
one that leaves gives its node back, and one more needs no other group.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from launch.cluster.placement import ACTORS, LEARNER, Node, Role, describe, in_pieces, missing_capacity, planned_roles
from launch.errors import UserError
from launch.settings.run import RunSettings

RELEASE_TIMEOUT_S = 15.0
"""Longest wait for what others hold, on a cluster that does not grow: a run that has ended gives it back."""
PLACING_S = 5.0
"""Ray may take this time to place what fits."""
POLL_S = 1  # whole seconds, as Ray counts this time


class RunCapacity:
    """What one run has reserved; a context manager, at whose end nothing is reserved any more."""

    def __init__(self, settings: RunSettings) -> None:
        self._roles = planned_roles(settings)
        self._grow_timeout_s = settings.cluster.grow_timeout_s
        self._groups: dict[str, PlacementGroup] = {}

    def __enter__(self) -> RunCapacity:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if ray.is_initialized():
            for group in self._groups.values():
                remove_placement_group(group)

    @property
    def learner(self) -> PlacementGroup:
        """One bundle for each rank of the learner."""
        return self._groups[LEARNER]

    def reserve(self, while_waiting: Callable[[str], None]) -> str:
        """Reserve a place for each process of the plan, as soon as the cluster has the capacity.

        Gives in one line which nodes have how many processes. while_waiting: called with what is missing.

        Raises:
            UserError: the cluster lacks the capacity, or lacks it for too long; says what is missing and where.
        """
        nodes = live_nodes()
        if self._grow_timeout_s is None:
            timeout_s, waited_for = RELEASE_TIMEOUT_S, ""
            if missing_capacity(self._roles, _emptied(nodes)):
                raise UserError(missing_capacity(self._roles, nodes))  # others could not make enough room
        else:
            timeout_s = self._grow_timeout_s
            waited_for = f"waited {timeout_s:g} s (cluster.grow_timeout_s) for Ray's autoscaler to add nodes: "
        began_at = time.monotonic()
        # Ray places the groups in this order: first those that fewer nodes can take.
        for role in sorted(self._roles, key=lambda role: (len(role.each), max(role.each.values())), reverse=True):
            self._groups[role.name] = placement_group([dict(role.each)] * role.count, strategy=role.placement.upper())
        while waiting := [role for role in self._roles if not self._groups[role.name].wait(POLL_S)]:
            nodes = live_nodes()
            missing = missing_capacity(waiting, nodes)
            waited_s = time.monotonic() - began_at
            if missing is None and waited_s < PLACING_S:
                continue
            missing = missing or in_pieces(waiting[0], nodes)
            if waited_s >= timeout_s:
                raise UserError(waited_for + missing)
            while_waiting(missing)
        names = {node.node_id: node.name for node in live_nodes()}
        return describe({role.name: [names.get(each, each) for each in self._nodes(role)] for role in self._roles})

    def release_actors(self) -> list[str]:
        """Give back what was reserved for the actors, so that the actors themselves can take it; gives the id of the
        node of each actor, by its number.
        """
        node_ids = [each for role in self._roles if role.name == ACTORS for each in self._nodes(role)]
        if node_ids:
            remove_placement_group(self._groups.pop(ACTORS))
        return node_ids

    def _nodes(self, role: Role) -> list[str]:
        places: dict[int, str] = placement_group_table(self._groups[role.name])["bundles_to_node_id"]
        return [places.get(number, "") for number in range(role.count)]


def check_possible(settings: RunSettings, num_actors: int) -> None:
    """Refuse a number of actors that the live cluster could not hold if nobody else were there.

    Raises:
        UserError: what is missing, and where. Not on a cluster that grows.
    """
    if settings.cluster.grow_timeout_s is None:
        missing = missing_capacity(planned_roles(settings, num_actors), _emptied(live_nodes()))
        if missing is not None:
            raise UserError(missing)


def live_nodes() -> list[Node]:
    """The nodes that Ray has now, this one first, the others by id."""
    here = ray.get_runtime_context().get_node_id()
    free = available_resources_per_node()
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [
        Node(node["NodeID"], node["NodeManagerAddress"], free.get(node["NodeID"], {}), node["Resources"])
        for node in sorted(alive, key=lambda node: (node["NodeID"] != here, node["NodeID"]))
    ]


def _emptied(nodes: Sequence[Node]) -> list[Node]:
    """As if nobody used them."""
    return [replace(node, free=node.total) for node in nodes]
