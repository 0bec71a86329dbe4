"""The status that actors and their pool report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

STARTING = "starting"
WAITING_FOR_WEIGHTS = "waiting for weights"
DRAINING = "draining"
PAUSED = "paused"
FINISHING = "finishing rollouts before new weights"
HELD_BACK = "ahead of the learner"
GENERATING = "generating"

PoolEventKind = Literal[
    "pool_scaled",
    "actor_starting",
    "actor_ready",
    "actor_joined",
    "actor_draining",
    "actor_left",
    "actor_ended",
    "actor_failed",
    "actor_given_up",
]


@dataclass(frozen=True)
class ActorStatus:
    """One rollout actor's counters, since its birth."""

    name: str
    policy_version: int  # of the loaded weights; -1 before the first push
    actions: int
    actions_per_s: float  # over the last seconds
    backspaces: int
    trajectories: int  # finished and handed to the buffer
    rejected: int  # refused by the buffer's door
    in_flight: int
    activity: str  # what it does now: "generating", "waiting for weights", ...
    dropped: int = 0  # rollouts without a finite reward or feature
    drop_reason: str | None = None  # of the newest of them
    weights_note: str | None = None  # how the newest weights were proven, where there is something to say of it


@dataclass(frozen=True)
class MemberStatus:
    """An actor as its pool sees it."""

    name: str
    state: str  # "starting", "running", "draining"
    restarts: int
    status: ActorStatus | None  # None until it has answered once
    join_s: float | None = None  # from its making to its first rollouts; None before, or where it was made to wait


@dataclass(frozen=True)
class PoolEvent:
    """Something that the pool did or saw. number: counts the events of a pool. actor: its name, empty for the pool."""

    number: int
    kind: PoolEventKind
    actor: str
    message: str


@dataclass(frozen=True)
class PoolStatus:
    """The pool of rollout actors."""

    desired: int
    newest_version: int
    members: tuple[MemberStatus, ...]
    events: tuple[PoolEvent, ...] = field(default=())  # newest last
    failure: str | None = None  # set when the pool has given up
    refused: bool = False  # it gave up because the settings cannot be met, and no restart would help

    def losses(self) -> str:
        """What kept rollouts from the buffer, for people; empty where nothing did."""
        statuses = [member.status for member in self.members if member.status is not None and member.status.dropped]
        told = []
        if statuses:
            dropped = sum(status.dropped for status in statuses)
            told.append(f"the actors dropped {dropped:,} rollouts, the last one because {statuses[-1].drop_reason}")
        told += [event.message for event in self.events if event.kind == "actor_failed"][-1:]
        return "; ".join(told)
