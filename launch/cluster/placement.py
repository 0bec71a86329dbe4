"""The plan of a run: what each of its processes needs, and which node each of them gets.

Pure, so that a plan is refused before anything starts, with what is missing and where. Within a role all processes need
the same, so that for two roles the question whether they fit can be answered exactly: once the ranks of the learner are
placed, each node takes a known number of actors, wherever Ray puts them; and the ways to place the ranks are searched
by dynamic programming over the nodes. (With many kinds of processes this is bin packing, for which nobody knows a quick
answer.) Driver, actor pool and buffer shards need no resources.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from actors.pool.node_choice import UNITS, NodeRoom, Placement, choose_node, in_units
from launch.errors import UserError
from launch.settings.run import RunSettings, needs_actors

LEARNER, ACTORS = "learner", "actors"


@dataclass(frozen=True)
class Role:
    """Processes of one kind. name: of their section in a recipe; each: what one of them needs, in units.

    parts: processes that make up each of them (actors.tensor_parallel_size), on one node: `each` is for all of these.
    """

    name: str
    count: int
    each: Mapping[str, int]
    placement: Placement
    parts: int = 1

    def process(self, number: int) -> str:
        """For messages."""
        of_all = "" if self.count == 1 else f" {number + 1} of {self.count}"
        parts = "" if self.parts == 1 else f" (its {self.parts} processes)"
        return f"{'actor' if self.name == ACTORS else 'learner rank'}{of_all}{parts}"


@dataclass(frozen=True)
class Node:
    """A live node. name: its address; free: what may be used, total: what it offers, in units."""

    node_id: str
    name: str
    free: Mapping[str, int]
    total: Mapping[str, int]

    def empty(self) -> Node:
        """As if nobody used it."""
        return replace(self, free=self.total)


Assignment = dict[str, list[Node]]
"""The node of each process, by the name of its role."""


def planned_roles(settings: RunSettings, num_actors: int | None = None) -> list[Role]:
    """The learner, and the actors where a stage needs them. num_actors: in place of the most that the recipe allows."""
    learner, actors = settings.learner, settings.actors
    each_rank = in_units({"CPU": learner.num_cpus, "GPU": learner.num_gpus, **learner.resources})
    ranks = Role(LEARNER, learner.num_ranks, each_rank, learner.placement)
    count = actors.most if num_actors is None else num_actors
    if count == 0 or not any(needs_actors(stage, settings.noise) for stage in settings.stages):
        return [ranks]
    each = in_units(actors.needs())
    return [ranks, Role(ACTORS, count, each, actors.placement, actors.tensor_parallel_size)]


def total(roles: Sequence[Role]) -> dict[str, float]:
    """Amount of each resource that all processes need together."""
    return {kind: amount / UNITS for kind, amount in _total(roles).items()}


def bundles(roles: Sequence[Role]) -> list[dict[str, float]]:
    """What each process needs, one after the other."""
    return [{kind: amount / UNITS for kind, amount in role.each.items()} for role in roles for _ in range(role.count)]


def assign(roles: Sequence[Role], nodes: Sequence[Node]) -> Assignment:
    """A node for each process: as each role wants to lie, or in any way where the rest would not fit then.

    roles: two at most.

    Raises:
        UserError: they do not fit; says what is missing, or which process finds no room and what the nodes have left.
    """
    assert len(roles) <= 2, "a third one would need another search"
    _check_sums(roles, nodes)
    rooms = [NodeRoom(node.node_id, node.free) for node in nodes]
    assignment: Assignment = {}
    for role, following in itertools.zip_longest(roles, roles[1:]):
        places = _distribute(role, rooms)
        if len(places) < role.count:
            raise UserError(_no_room(role, len(places), nodes, _after(role, rooms, places)))
        if following is not None and _capacity(following, _after(role, rooms, places)) < following.count:
            places = _leaving_most_room(role, following, rooms)
        rooms = _after(role, rooms, places)
        assignment[role.name] = [nodes[index] for index in places]
    return assignment


def plan_lines(settings: RunSettings) -> list[str]:
    """The plan as a table for people: what Ray sets aside for each process of the run."""
    roles = planned_roles(settings)
    rows = [(f"{role.count} x {_amounts(role.each)}", role.name, _note(role)) for role in roles]
    if len(roles) > 1:
        shards = settings.buffer.shards
        rows.append((f"{shards} x nothing", "buffer", "shards, on the driver's node and the others in turn"))
    rows.append((_amounts(_total(roles)), "all", "together, to be free when the run starts"))
    width = max(len(amount) for amount, _, _ in rows)
    return [f"{name:<8} {amount:<{width}}  {note}" for amount, name, note in rows]


def describe(assignment: Assignment) -> str:
    """Which nodes have how many processes, in one line."""
    parts = []
    for role, nodes in assignment.items():
        counts = Counter(node.name for node in nodes)
        parts.append(f"{role} on " + ", ".join(f"{name} ({count})" for name, count in counts.items()))
    return "; ".join(parts)


def _note(role: Role) -> str:
    parts = "" if role.parts == 1 else f", each of {role.parts} processes on one node"
    return f"placement={role.placement}{parts}"


def _total(roles: Sequence[Role]) -> Counter[str]:
    needed: Counter[str] = Counter()
    for role in roles:
        for kind, amount in role.each.items():
            needed[kind] += role.count * amount
    return needed


def _distribute(role: Role, rooms: Sequence[NodeRoom]) -> list[int]:
    """Index of the node of each process, of as many as fit."""
    rooms = list(rooms)
    places: list[int] = []
    while len(places) < role.count and (index := choose_node(role.placement, role.each, rooms)) is not None:
        rooms[index] = rooms[index].with_more(role.each)
        places.append(index)
    return places


def _leaving_most_room(role: Role, following: Role, rooms: Sequence[NodeRoom]) -> list[int]:
    """Index of the node of each process, so that as many as possible of the following role fit beside them."""
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}  # by processes placed: room left, and how many where
    for room in rooms:
        most = min(room.capacity(role.each), role.count)
        left = [room.with_more(role.each, count).capacity(following.each) for count in range(most + 1)]
        extended: dict[int, tuple[int, tuple[int, ...]]] = {}
        for placed, (room_left, counts) in best.items():
            for count in range(min(most, role.count - placed) + 1):
                before = extended.get(placed + count)
                if before is None or room_left + left[count] > before[0]:
                    extended[placed + count] = room_left + left[count], (*counts, count)
        best = extended
    return [index for index, count in enumerate(best[role.count][1]) for _ in range(count)]


def _after(role: Role, rooms: Sequence[NodeRoom], places: Sequence[int]) -> list[NodeRoom]:
    """What the nodes have left for the next role."""
    counts = Counter(places)
    return [NodeRoom(room.node_id, room.with_more(role.each, counts[index]).free) for index, room in enumerate(rooms)]


def _capacity(role: Role, rooms: Sequence[NodeRoom]) -> int:
    return sum(room.capacity(role.each) for room in rooms)


def _check_sums(roles: Sequence[Role], nodes: Sequence[Node]) -> None:
    # What no node has at all comes first: an autoscaler that has no such nodes either adds none for the rest.
    for kind, needed in sorted(_total(roles).items(), key=lambda item: any(item[0] in node.total for node in nodes)):
        free = sum(node.free.get(kind, 0) for node in nodes)
        if needed <= free:
            continue
        by_role = ", ".join(
            f"{_amount(role.count * role.each[kind])} for {role.name}" for role in roles if role.each.get(kind)
        )
        remedy = (
            f"lower {_knobs(roles, kind)}, or raise cluster.num_cpus or add nodes"
            if kind in ("CPU", "GPU")
            else f"start nodes with `ray start --resources '{json.dumps({kind: needed / UNITS})}'`, or change "
            f"{' or '.join(f'{role.name}.resources' for role in roles if role.each.get(kind))}"
        )
        raise UserError(
            f"the plan needs {_of_kind(needed, kind)} ({by_role}), the cluster has {_amount(free)} free"
            f"{_where(nodes, kind)}: {remedy}"
        )


def _no_room(role: Role, number: int, nodes: Sequence[Node], rooms: Sequence[NodeRoom]) -> str:
    """For the first process that finds no room."""
    left = []
    for node, room in zip(nodes, rooms, strict=True):
        kinds = ", ".join(
            f"{_amount(room.free.get(kind, 0))} of {_amount(node.total.get(kind, 0))} {kind}" for kind in role.each
        )
        left.append(f"{node.name} has {kinds} left")
    knobs = " or ".join(_knobs([role], kind) for kind in role.each if kind in ("CPU", "GPU"))
    return (
        f"the plan does not fit: {role.process(number)} needs {_amounts(role.each)} on one node; beside the rest of "
        f"the plan {'; '.join(left)}: lower {knobs}, or add nodes"
    )


def _knobs(roles: Sequence[Role], kind: str) -> str:
    """Settings that make the need for CPUs or GPUs smaller."""
    names = [f"{role.name}.num_{kind.lower()}s" for role in roles if role.each.get(kind)]
    counts = {LEARNER: "learner.num_ranks", ACTORS: "actors.count (with autoscale: actors.autoscale.max)"}
    names += [counts[role.name] for role in roles if role.each.get(kind) and role.count > 1]
    names += [f"{role.name}.tensor_parallel_size" for role in roles if role.each.get(kind) and role.parts > 1]
    return ", ".join(names)


def _where(nodes: Sequence[Node], kind: str) -> str:
    """What each node has, of several."""
    if len(nodes) < 2:
        return ""
    each = (
        f"{node.name} {_amount(node.free.get(kind, 0))} of {_amount(node.total[kind])}"
        for node in nodes
        if node.total.get(kind)
    )
    listed = ", ".join(each)
    return f" ({listed})" if listed else ""


def _amounts(resources: Mapping[str, int]) -> str:
    return " + ".join(f"{_amount(amount)} {kind}" for kind, amount in resources.items())


def _of_kind(amount: int, kind: str) -> str:
    return f"{_amount(amount)} {kind if kind in ('CPU', 'GPU') else f'of the custom resource {kind!r}'}"


def _amount(units: int) -> str:
    return f"{units / UNITS:g}"
