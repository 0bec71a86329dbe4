"""Room for a run on a live cluster: the plan is placed on the nodes as they are, or Ray's autoscaler is asked for more.

Ray keeps one request for the whole cluster, and the newest one counts: of two runs on one cluster the later replaces
what the earlier asked for beyond what it uses. What runs keeps its nodes in any case.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType

import ray
from ray._private.state import available_resources_per_node
from ray.autoscaler.sdk import request_resources

from actors.pool.node_choice import in_units
from launch.cluster.placement import Assignment, Node, Role, assign, bundles, planned_roles
from launch.errors import UserError
from launch.settings.run import RunSettings

RELEASE_TIMEOUT_S = 15.0
"""Longest wait for what others hold, on a cluster that does not grow: a run that has ended gives it back."""

POLL_S = 0.25


class ClusterRoom:
    """The room of one run; a context manager, at whose end the autoscaler is asked for nothing any more."""

    def __init__(self, settings: RunSettings) -> None:
        self._settings = settings
        self._grow_timeout_s = settings.cluster.grow_timeout_s
        self._requested_actors: int | None = None

    def __enter__(self) -> ClusterRoom:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._requested_actors is not None and ray.is_initialized():
            request_resources(bundles=[])

    def place(self, while_waiting: Callable[[str], None]) -> Assignment:
        """A node for each process of the plan, as soon as the cluster has room. while_waiting: is told for what.

        Raises:
            UserError: it has none, or none in time; says what is missing and where.
        """
        roles = planned_roles(self._settings)
        self.request(self._settings.actors.most)
        began_at = time.monotonic()
        while True:
            nodes = live_nodes()
            try:
                return assign(roles, nodes)
            except UserError as error:
                waited_s = time.monotonic() - began_at
                if self._grow_timeout_s is None:
                    if waited_s >= RELEASE_TIMEOUT_S or not _ever_fits(roles, nodes):
                        raise
                elif waited_s >= self._grow_timeout_s:
                    raise UserError(
                        f"waited {self._grow_timeout_s:g} s (cluster.grow_timeout_s) for Ray's autoscaler to add "
                        f"nodes: {error}"
                    ) from None
                while_waiting(str(error))
            time.sleep(POLL_S)

    def request(self, num_actors: int) -> None:
        """Ask the autoscaler for what the run needs with so many actors; nothing where the cluster does not grow."""
        if self._grow_timeout_s is None or num_actors == self._requested_actors:
            return
        self._requested_actors = num_actors
        request_resources(bundles=bundles(planned_roles(self._settings, num_actors)))


def check_possible(settings: RunSettings, num_actors: int) -> None:
    """Refuse a number of actors that the live cluster could not hold if nobody else were there.

    Raises:
        UserError: what is missing, and where. Not on a cluster that grows.
    """
    if settings.cluster.grow_timeout_s is None:
        assign(planned_roles(settings, num_actors), [node.empty() for node in live_nodes()])


def _ever_fits(roles: Sequence[Role], nodes: Sequence[Node]) -> bool:
    """Whether others could make room."""
    try:
        assign(roles, [node.empty() for node in nodes])
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
