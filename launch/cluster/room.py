"""Room for a run on a live cluster: the plan is placed on the nodes as they are, or Ray's autoscaler is asked for more.

Of processes that wait for a node Ray's autoscaler knows by itself, and nodes in use it leaves alone. It is asked only
while the processes of the plan do not exist yet. What it is asked for it compares with the nodes as if they were empty,
and any of them may stand for it, be it in use or idle. So the request names the nodes that are there, whole, and what
finds no room on them; and it is withdrawn in time, or nodes that nobody needs any more would be kept.

Ray keeps one request for the whole cluster, and the newest one counts: of two runs that wait at a time, the later one
replaces what the earlier one asked for.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType

import ray
from ray._private.state import available_resources_per_node
from ray.autoscaler.sdk import request_resources

from actors.pool.node_choice import UNITS, in_units
from launch.cluster.placement import Assignment, Node, Role, assign, bundles, planned_roles
from launch.errors import UserError
from launch.settings.run import RunSettings

RELEASE_TIMEOUT_S = 15.0
"""Longest wait for what others hold, on a cluster that does not grow: a run that has ended gives it back."""

POLL_S = 0.25


class ClusterRoom:
    """The room of one run; a context manager, at whose end the autoscaler is asked for nothing in any case."""

    def __init__(self, settings: RunSettings) -> None:
        self._settings = settings
        self._grow_timeout_s = settings.cluster.grow_timeout_s
        self._requested: list[dict[str, float]] = []

    def __enter__(self) -> ClusterRoom:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if ray.is_initialized():
            self.withdraw()

    def place(self, while_waiting: Callable[[str], None]) -> Assignment:
        """A node for each process of the plan, as soon as the cluster has room. while_waiting: is told for what.

        Raises:
            UserError: it has none, or none in time; says what is missing and where.
        """
        roles = planned_roles(self._settings)
        began_at = time.monotonic()
        while True:
            nodes = live_nodes()
            if self._grow_timeout_s is not None:
                self._request(_to_ask_for(roles, nodes))
            try:
                return assign(roles, nodes)
            except UserError as error:
                waited_s = time.monotonic() - began_at
                if self._grow_timeout_s is None:
                    if waited_s >= RELEASE_TIMEOUT_S or not _fit(roles, [node.empty() for node in nodes]):
                        raise  # also others could make no room
                elif waited_s >= self._grow_timeout_s:
                    raise UserError(
                        f"waited {self._grow_timeout_s:g} s (cluster.grow_timeout_s) for Ray's autoscaler to add "
                        f"nodes: {error}"
                    ) from None
                while_waiting(str(error))
            time.sleep(POLL_S)

    def withdraw(self) -> None:
        """Ask the autoscaler for nothing any more: the processes exist, and Ray sees which of them wait for a node."""
        self._request([])

    def _request(self, wanted: list[dict[str, float]]) -> None:
        if wanted != self._requested:
            self._requested = wanted
            request_resources(bundles=wanted)


def check_possible(settings: RunSettings, num_actors: int) -> None:
    """Refuse a number of actors that the live cluster could not hold if nobody else were there.

    Raises:
        UserError: what is missing, and where. Not on a cluster that grows.
    """
    if settings.cluster.grow_timeout_s is None:
        assign(planned_roles(settings, num_actors), [node.empty() for node in live_nodes()])


def _to_ask_for(roles: Sequence[Role], nodes: Sequence[Node]) -> list[dict[str, float]]:
    """Each node, as far as the plan needs its kinds of resources, and each process that finds no room on them."""
    kinds = {kind for role in roles for kind in role.each}
    there = [{kind: amount / UNITS for kind, amount in node.total.items() if kind in kinds} for node in nodes]
    return [*filter(None, there), *bundles(_without_room(roles, nodes))]


def _without_room(roles: Sequence[Role], nodes: Sequence[Node]) -> list[Role]:
    """Of each role the processes that find none: as few as there can be, those of the first role before others."""
    placed: list[Role] = []
    for role in roles:
        counts = range(1, role.count + 1)
        fitting = bisect_left(counts, True, key=lambda count: not _fit([*placed, replace(role, count=count)], nodes))
        placed.append(replace(role, count=fitting))
    return [replace(role, count=role.count - its.count) for role, its in zip(roles, placed, strict=True)]


def _fit(roles: Sequence[Role], nodes: Sequence[Node]) -> bool:
    try:
        assign(roles, nodes)
    except UserError:
        return False
    return True


def live_nodes() -> list[Node]:
    """The nodes that Ray has now, this one first, the others by id."""
    here = ray.get_runtime_context().get_node_id()
    free = available_resources_per_node()
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            in_units(free.get(node["NodeID"], {})),
            in_units(node["Resources"]),
        )
        for node in sorted(alive, key=lambda node: (node["NodeID"] != here, node["NodeID"]))
    ]
