"""The plan of a run: what each of its processes needs, and what a cluster lacks for it.

Pure, and Ray is not imported. Ray itself chooses the nodes (`launch.cluster.capacity`). Driver, actor pool and buffer
shards need no resources.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from launch.settings.run import RunSettings, needs_actors

LEARNER, ACTORS = "learner", "actors"

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
            if kind in ("CPU", "GPU"):
                of_kind, remedy = kind, f"lower {_knobs(roles, kind)}, or raise cluster.num_cpus or add nodes"
            else:
                of_kind, start = f"of the custom resource {kind!r}", json.dumps({kind: needed[kind]})
                sections = " or ".join(f"{role.name}.resources" for role in users)
                remedy = f"start nodes with `ray start --resources '{start}'`, or change {sections}"
            having = [
                f"{node.name} {node.free.get(kind, 0.0):g} of {node.total[kind]:g}"
                for node in nodes
                if node.total.get(kind)
            ]
            where = f" ({', '.join(having)})" if len(nodes) > 1 and having else ""
            return (
                f"the plan needs {needed[kind]:g} {of_kind} ({by_role}), the cluster has {free:g} free{where}: {remedy}"
            )
    return next((in_pieces(role, nodes) for role in roles if _capacity(role, nodes) < role.count), None)


def in_pieces(role: Role, nodes: Sequence[Node]) -> str:
    """The message for a role that finds no place, though the nodes have enough of each resource in sum."""
    left = "; ".join(
        f"{node.name} has "
        + ", ".join(f"{node.free.get(kind, 0.0):g} of {node.total.get(kind, 0.0):g} {kind}" for kind in role.each)
        + " left"
        for node in nodes
    )
    process = "actor" if role.name == ACTORS else "learner rank"
    parts = "" if role.parts == 1 else f" (for its {role.parts} processes)"
    knobs = " or ".join(_knobs([role], kind) for kind in role.each if kind in ("CPU", "GPU"))
    return (
        f"the plan does not fit: each {process} of {role.count} needs {_amounts(role.each)}{parts} on one node; "
        f"{left}: lower {knobs}, or add nodes"
    )


def plan_lines(settings: RunSettings) -> list[str]:
    """The plan as a table for people: what Ray sets aside for each process of the run."""
    roles = planned_roles(settings)
    rows = []
    for role in roles:
        parts = "" if role.parts == 1 else f", each of {role.parts} processes on one node"
        rows.append((role.name, f"{role.count} x {_amounts(role.each)}", f"placement={role.placement}{parts}"))
    if len(roles) > 1:
        shards = f"{settings.buffer.shards} x nothing"
        rows.append(("buffer", shards, "shards, on the driver's node and the others in turn"))
    rows.append(("all", _amounts(total(roles)), "together, to be free when the run starts"))
    width = max(len(amount) for _, amount, _ in rows)
    return [f"{name:<8} {amount:<{width}}  {note}" for name, amount, note in rows]


def describe(places: Mapping[str, Sequence[str]]) -> str:
    """Which nodes have how many processes, in one line. places: name of each process's node, by role."""
    return "; ".join(
        f"{role} on " + ", ".join(f"{name} ({count})" for name, count in Counter(names).items())
        for role, names in places.items()
    )


def _positive(amounts: Mapping[str, float]) -> dict[str, float]:
    return {kind: float(amount) for kind, amount in amounts.items() if amount}


def _capacity(role: Role, nodes: Sequence[Node]) -> int:
    """How many of the role's processes the nodes could hold, without any other role."""
    slack = ROUNDING / 2
    return sum(
        min(int((node.free.get(kind, 0.0) + slack) / amount) for kind, amount in role.each.items()) for node in nodes
    )


def _knobs(roles: Sequence[Role], kind: str) -> str:
    """Settings that make the need for CPUs or GPUs smaller."""
    users = [role for role in roles if kind in role.each]
    counts = {LEARNER: "learner.num_ranks", ACTORS: "actors.count (with autoscale: actors.autoscale.max)"}
    names = [f"{role.name}.num_{kind.lower()}s" for role in users]
    names += [counts[role.name] for role in users if role.count > 1]
    names += [f"{role.name}.tensor_parallel_size" for role in users if role.parts > 1]
    return ", ".join(names)


def _amounts(resources: Mapping[str, float]) -> str:
    return " + ".join(f"{amount:g} {kind}" for kind, amount in resources.items())
