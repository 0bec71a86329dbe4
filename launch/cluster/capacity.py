"""The capacity of a run: what each of its processes needs, one check of the sums, and a placement group for each role.

Ray chooses the nodes, all of a group at once, and Ray's autoscaler adds nodes for a group that waits. The learner runs
in its group. That of the actors only keeps their capacity until the pool makes them: an actor belongs to no group, so
one that leaves gives its node back, and one more needs no other group. Driver, pool and buffer need no resources.
Ray is imported by what asks it alone: a plan is shown without it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from launch.errors import UserError
from launch.settings.run import RunSettings, needs_actors

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

LEARNER, ACTORS = "learner", "actors"
RELEASE_TIMEOUT_S = 15.0
"""Longest wait for what others hold, on a cluster that does not grow: a run that has ended gives it back."""
PLACING_S = 5.0
"""Ray may take this time to place what fits."""
POLL_S = 1  # whole seconds, as Ray counts this time
ROUNDING = 1e-4
"""Ray counts resources in units of this."""


@dataclass(frozen=True)
class Role:
    """Processes of one kind. name: of their section in a recipe; each: amounts that one of them needs, on one node.

    parts: processes that make up each of them (actors.tensor_parallel_size): `each` is for all of these.
    """

    name: str
    count: int
    each: Mapping[str, float]
    placement: Literal["pack", "spread"]
    parts: int = 1


@dataclass(frozen=True)
class Node:
    """A live node. name: its address; free: amounts that may be used, total: that it offers."""

    node_id: str
    name: str
    free: Mapping[str, float]
    total: Mapping[str, float]


class RunCapacity:
    """What one run has reserved; a context manager, at whose end nothing is reserved any more."""

    def __init__(self, settings: RunSettings) -> None:
        self._roles = planned_roles(settings)
        self._grow_timeout_s = settings.cluster.grow_timeout_s
        self._groups: dict[str, PlacementGroup] = {}

    def __enter__(self) -> RunCapacity:
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        for name in list(self._groups) if ray.is_initialized() else ():
            self._release(name)

    @property
    def learner(self) -> PlacementGroup:
        """One bundle for each rank of the learner."""
        return self._groups[LEARNER]

    def reserve(self, while_waiting: Callable[[str], None]) -> str:
        """Reserve a place for each process of the plan, as soon as the cluster has the capacity.

        Gives in one line which nodes have how many processes. while_waiting: called with what is missing. UserError if
        the cluster lacks it, or for too long.
        """
        from ray.util.placement_group import placement_group

        timeout_s, waited_for = RELEASE_TIMEOUT_S, ""
        if self._grow_timeout_s is not None:
            timeout_s = self._grow_timeout_s
            waited_for = f"waited {timeout_s:g} s (cluster.grow_timeout_s) for Ray's autoscaler to add nodes: "
        elif missing := _never_enough(self._roles):  # others could not make enough room
            raise UserError(missing)
        began_at = time.monotonic()
        # Ray places the groups in this order: first those that fewer nodes can take.
        for role in sorted(self._roles, key=lambda role: (len(role.each), max(role.each.values())), reverse=True):
            self._groups[role.name] = placement_group([dict(role.each)] * role.count, strategy=role.placement.upper())
        while waiting := [role for role in self._roles if not self._groups[role.name].wait(POLL_S)]:
            nodes, waited_s = live_nodes(), time.monotonic() - began_at
            missing = missing_capacity(waiting, nodes)
            if missing is None and waited_s < PLACING_S:
                continue
            missing = missing or _in_pieces(waiting[0], nodes)
            if waited_s >= timeout_s:
                raise UserError(waited_for + missing)
            while_waiting(missing)
        names = {node.node_id: node.name for node in live_nodes()}
        counts = {role.name: Counter(names.get(each, each) for each in self._nodes(role)) for role in self._roles}
        return "; ".join(
            f"{role} on " + ", ".join(f"{name} ({count})" for name, count in found.items())
            for role, found in counts.items()
        )

    def release_actors(self) -> list[str]:
        """Give what was reserved for the actors back to them; gives the id of the node of each actor, by its number."""
        node_ids = [each for role in self._roles if role.name == ACTORS for each in self._nodes(role)]
        if node_ids:
            self._release(ACTORS)
        return node_ids

    def _release(self, name: str) -> None:
        from ray.util.placement_group import remove_placement_group

        remove_placement_group(self._groups.pop(name))

    def _nodes(self, role: Role) -> list[str]:
        from ray.util.placement_group import placement_group_table

        places: dict[int, str] = placement_group_table(self._groups[role.name])["bundles_to_node_id"]
        return [places.get(number, "") for number in range(role.count)]


def check_possible(settings: RunSettings, num_actors: int) -> None:
    """UserError for a number of actors that the live cluster could not hold if nobody else were there; it may grow."""
    if settings.cluster.grow_timeout_s is None and (missing := _never_enough(planned_roles(settings, num_actors))):
        raise UserError(missing)


def live_nodes() -> list[Node]:
    """The nodes that Ray has now, this one first, the others by id."""
    import ray
    from ray._private.state import available_resources_per_node

    here = ray.get_runtime_context().get_node_id()
    free = available_resources_per_node()
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [
        Node(node["NodeID"], node["NodeManagerAddress"], free.get(node["NodeID"], {}), node["Resources"])
        for node in sorted(alive, key=lambda node: (node["NodeID"] != here, node["NodeID"]))
    ]


def planned_roles(settings: RunSettings, num_actors: int | None = None) -> list[Role]:
    """The learner, and the actors where a stage needs them. num_actors: in place of the most that the recipe allows."""
    learner, actors = settings.learner, settings.actors
    each_rank = {"CPU": learner.num_cpus, "GPU": learner.num_gpus, **learner.resources}
    ranks = Role(LEARNER, learner.num_ranks, _positive(each_rank), learner.placement)
    count = actors.most if num_actors is None else num_actors
    if count == 0 or not any(needs_actors(stage, settings.noise) for stage in settings.stages):
        return [ranks]
    return [ranks, Role(ACTORS, count, _positive(actors.needs()), actors.placement, actors.tensor_parallel_size)]


def total(roles: Sequence[Role]) -> dict[str, float]:
    """Amount of each resource that all processes need together."""
    kinds = {kind: None for role in roles for kind in role.each}  # in the order of their first role
    return {kind: round(sum(role.count * role.each.get(kind, 0.0) for role in roles), 4) for kind in kinds}


def missing_capacity(roles: Sequence[Role], nodes: Sequence[Node]) -> str | None:
    """What the nodes do not have free for these processes, and how to make the plan smaller or the cluster larger.

    Gives None where each kind of resource suffices in sum, and the nodes can hold the processes of either role alone.
    """
    # What no node has at all comes first: an autoscaler that has no such nodes either cannot mend the rest.
    needed = total(roles)
    for kind in sorted(needed, key=lambda kind: any(kind in node.total for node in nodes)):
        free = sum(node.free.get(kind, 0.0) for node in nodes)
        if needed[kind] > free + ROUNDING / 2:
            users = [role for role in roles if kind in role.each]
            by_role = ", ".join(f"{role.count * role.each[kind]:g} for {role.name}" for role in users)
            problem = f"the plan needs {needed[kind]:g} {kind} ({by_role}), the cluster has {free:g} free"
            return _with_advice(problem, users, [kind], nodes)
    return next((_in_pieces(role, nodes) for role in roles if _capacity(role, nodes) < role.count), None)


def plan_lines(settings: RunSettings) -> list[str]:
    """The plan as a table for people: what Ray sets aside for each process of the run."""
    roles = planned_roles(settings)
    rows = [("driver", "1 x nothing", "with the actor pool; on this node, or the job's")]
    for role in roles:
        parts = "" if role.parts == 1 else f", each of {role.parts} processes on one node"
        rows.append((role.name, f"{role.count} x {_amounts(role.each)}", f"placement={role.placement}{parts}"))
    if len(roles) > 1:
        shards = f"{settings.buffer.shards} x nothing"
        rows.append(("buffer", shards, "shards, on the nodes in turn, the driver's first"))
    rows.append(("all", _amounts(total(roles)), "together, to be free when the run starts"))
    width = max(len(amount) for _, amount, _ in rows)
    return [f"{name:<8} {amount:<{width}}  {note}" for name, amount, note in rows]


def _never_enough(roles: Sequence[Role]) -> str | None:
    """What the cluster would lack even if nobody used it; the message says what is free now."""
    nodes = live_nodes()
    emptied = [replace(node, free=node.total) for node in nodes]
    return missing_capacity(roles, nodes) if missing_capacity(roles, emptied) else None


def _in_pieces(role: Role, nodes: Sequence[Node]) -> str:
    """The message for a role that finds no place, though the nodes have enough of each resource in sum."""
    process = "actor" if role.name == ACTORS else "learner rank"
    problem = f"the plan does not fit: each {process} of {role.count} needs {_amounts(role.each)} on one node"
    return _with_advice(problem, [role], list(role.each), nodes)


def _with_advice(problem: str, roles: Sequence[Role], kinds: Sequence[str], nodes: Sequence[Node]) -> str:
    free = "; ".join(
        f"{node.name} "
        + ", ".join(f"{node.free.get(kind, 0.0):g} of {node.total.get(kind, 0.0):g} {kind}" for kind in kinds)
        for node in nodes
    )
    knobs = []
    for role in roles:
        own = {"CPU": "num_cpus", "GPU": "num_gpus"}
        knobs += [f"{role.name}.{own.get(kind, 'resources')}" for kind in kinds if kind in role.each]
        if role.count > 1:
            knobs.append("actors.count (or actors.autoscale.max)" if role.name == ACTORS else "learner.num_ranks")
        if role.parts > 1:
            knobs.append(f"{role.name}.tensor_parallel_size")
    return (
        f"{problem} ({free}): lower {', '.join(knobs)}, or offer more: cluster.num_cpus of a Ray started here, else "
        "nodes (`ray start`, with --resources for a custom one)"
    )


def _capacity(role: Role, nodes: Sequence[Node]) -> int:
    """How many of the role's processes the nodes could hold, without any other role."""
    slack = ROUNDING / 2
    return sum(
        min(int((node.free.get(kind, 0.0) + slack) / amount) for kind, amount in role.each.items()) for node in nodes
    )


def _positive(amounts: Mapping[str, float]) -> dict[str, float]:
    return {kind: float(amount) for kind, amount in amounts.items() if amount}


def _amounts(resources: Mapping[str, float]) -> str:
    return " + ".join(f"{amount:g} {kind}" for kind, amount in resources.items())
