"""Decides when actors of the pool start, drain and are replaced; it has no Ray code, so tests need no Ray.

The states of an actor:

    starting --ready--> running --drain--> draining --left--> gone
        |                  |                   |
        +-- error, silence or lost process ----+--> replaced after a back-off (or gone, if it was draining)

The caller passes the time. The controller reads the state of each actor's process and acts at once, without waiting.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal, Protocol

from actors.rollout_actor import PAUSED, THROTTLED, WAITING_FOR_WEIGHTS, ActorStatus
from actors.settings import ActorsSettings

MAX_BACKOFF_S = 30.0
MAX_EVENTS = 200

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
class MemberStatus:
    """The pool's view of an actor.

    state: "starting", "running", "draining". status: None until its first answer.
    join_s: from its creation to its first rollouts; None before, or where it had to wait for other reasons.
    """

    name: str
    state: str
    restarts: int
    status: ActorStatus | None
    join_s: float | None = None


@dataclass(frozen=True)
class PoolEvent:
    """An action or observation of the pool. number: counts its events. actor: its name, empty for the pool."""

    number: int
    kind: PoolEventKind
    actor: str
    message: str


@dataclass(frozen=True)
class PoolStatus:
    """events: newest last. failure: why the pool gave up. refused: whether the settings caused that."""

    desired: int
    newest_version: int
    members: tuple[MemberStatus, ...]
    events: tuple[PoolEvent, ...] = ()
    failure: str | None = None
    refused: bool = False

    def losses(self) -> str:
        """Why rollouts did not reach the buffer, as text for users; empty if none was lost."""
        losing = [member.status for member in self.members if member.status is not None and member.status.dropped]
        texts = []
        if losing:
            dropped = sum(status.dropped for status in losing)
            texts.append(f"the actors dropped {dropped:,} rollouts, the last one because {losing[-1].drop_reason}")
        texts += [event.message for event in self.events if event.kind == "actor_failed"][-1:]
        return "; ".join(texts)


@dataclass(frozen=True)
class Failure:
    """Why an actor failed. in_vain: a replacement would fail too. traceback: its end, if the reason is not enough."""

    reason: str
    in_vain: bool = False
    traceback: str = ""

    def __str__(self) -> str:
        return f"{self.reason}; its traceback ends with\n{self.traceback}" if self.traceback else self.reason


ActorState = Literal["starting", "ready", "running", "left"] | Failure
"""State of an actor's process: engine starts; waits for `start_actor`; generates or drains; ended; failed."""


class ActorProcesses(Protocol):
    """The processes of the actors, by name. No method waits."""

    def actor_state(self, name: str) -> ActorState:
        """State of an actor that was created and not removed."""

    def create_actor(self, name: str, number: int) -> None:
        """Start to create an actor. number: its index in the pool, from 0."""

    def start_actor(self, name: str) -> None:
        """Give a ready actor the newest weights and let it generate."""

    def drain_actor(self, name: str) -> None:
        """Ask an actor to finish its rollouts and to end."""

    def remove_actor(self, name: str) -> None:
        """Kill an actor, or forget one that has ended."""


@dataclass
class _Member:
    name: str
    created_at_s: float
    state: Literal["starting", "running", "draining"] = "starting"
    drain_started_at_s: float = 0.0
    last_answer_at_s: float = 0.0
    status: ActorStatus | None = None
    join_s: float | None = None
    waited: bool = False  # before its first rollouts: paused, throttled or without weights


class PoolController:
    """Keeps `desired` actors in the pool. Times are seconds on one clock that never goes back."""

    def __init__(self, desired: int, settings: ActorsSettings, processes: ActorProcesses) -> None:
        self.desired = desired
        """Target number of actors; lower than requested after the controller gave up on some."""
        self._failure: str | None = None
        self._refused = False
        self._settings = settings
        self._processes = processes
        self._events: deque[PoolEvent] = deque(maxlen=MAX_EVENTS)
        self._num_events = 0
        self._members: dict[str, _Member] = {}
        self._failures: dict[str, int] = {}  # in a row, by name
        self._retry_at_s: dict[str, float] = {}
        self._closed = False

    @property
    def names(self) -> list[str]:
        """Names of all actors, oldest first."""
        return list(self._members)

    def status(self, newest_version: int) -> PoolStatus:
        """All actors, oldest first, with their last answers. newest_version: of the weights."""
        members = (
            MemberStatus(member.name, member.state, self._failures.get(member.name, 0), member.status, member.join_s)
            for member in self._members.values()
        )
        return PoolStatus(
            self.desired, newest_version, tuple(members), tuple(self._events), self._failure, self._refused
        )

    def scale(self, desired: int) -> None:
        """Change the number of actors from the next `reconcile` on; a ValueError if it is negative."""
        if desired < 0:
            raise ValueError(f"the number of actors cannot be negative, got {desired}")
        self._note("pool_scaled", "", f"scale {self.desired} -> {desired}")
        self.desired = desired

    def close(self) -> None:
        """Set the target to 0 and create no more actors."""
        self._closed = True
        self.desired = 0

    def heard_from(self, name: str, status: ActorStatus, now_s: float) -> None:
        """Record the answer of an actor; the answer of a removed actor is ignored."""
        member = self._members.get(name)
        if member is None:
            return
        member.status = status
        member.last_answer_at_s = now_s
        if status.trajectories > 0:
            self._failures.pop(name, None)
        # If an actor had to wait, the time to its first rollouts is not the time that it needed to start.
        member.waited |= status.trajectories == 0 and status.activity in (WAITING_FOR_WEIGHTS, PAUSED, THROTTLED)
        if status.trajectories > 0 and member.join_s is None and not member.waited:
            member.join_s = now_s - member.created_at_s
            self._note("actor_joined", name, f"{name} joined: first rollouts after {member.join_s:.1f} s")

    def reconcile(self, now_s: float) -> None:
        """Update the state of every actor, then drain or create actors until their number is `desired`."""
        for member in list(self._members.values()):
            self._update(member, self._processes.actor_state(member.name), now_s)
        staying = [member for member in self._members.values() if member.state != "draining"]
        for member in staying[self.desired :]:
            self._drain(member, now_s)
        if self._failure is None and not self._closed:
            self._fill(now_s, self.desired - len(staying))

    def end(self, name: str, kind: PoolEventKind, message: str) -> None:
        """Kill an actor."""
        del self._members[name]
        self._processes.remove_actor(name)
        self._note(kind, name, message)

    def _note(self, kind: PoolEventKind, actor: str, message: str) -> None:
        self._events.append(PoolEvent(self._num_events, kind, actor, message))
        self._num_events += 1

    def _update(self, member: _Member, state: ActorState, now_s: float) -> None:
        settings = self._settings
        if isinstance(state, Failure):
            self._fail(member, state, now_s)
        elif state == "left":
            self.end(member.name, "actor_left", f"{member.name} left")
        elif member.state == "starting":
            waited_s = now_s - member.created_at_s
            if state == "ready":
                self._processes.start_actor(member.name)
                member.state = "running"
                member.last_answer_at_s = now_s
                self._note("actor_ready", member.name, f"{member.name} ready after {waited_s:.1f} s")
            elif waited_s > settings.start_timeout_s:
                self._fail(member, Failure(f"its engine did not start within {settings.start_timeout_s:.0f} s"), now_s)
        elif now_s - member.last_answer_at_s > settings.health_timeout_s:
            self._fail(member, Failure(f"silent for {settings.health_timeout_s:.0f} s"), now_s)
        elif member.state == "draining" and now_s - member.drain_started_at_s > settings.drain_timeout_s:
            message = f"{member.name} ended by force: not drained in {settings.drain_timeout_s:.0f} s"
            self.end(member.name, "actor_ended", message)

    def _drain(self, member: _Member, now_s: float) -> None:
        if member.state == "starting":
            self.end(member.name, "actor_ended", f"{member.name} removed before it was ready")
            return
        member.state = "draining"
        member.drain_started_at_s = now_s
        self._processes.drain_actor(member.name)
        self._note("actor_draining", member.name, f"{member.name} draining")

    def _fill(self, now_s: float, missing: int) -> None:
        number = 0
        while missing > 0:
            name = f"actor-{number}"
            if name not in self._members:
                missing -= 1
                if now_s >= self._retry_at_s.get(name, 0.0):
                    self._processes.create_actor(name, number)
                    self._members[name] = _Member(name, created_at_s=now_s)
                    self._note("actor_starting", name, f"{name} starting")
            number += 1

    def _fail(self, member: _Member, failure: Failure, now_s: float) -> None:
        name = member.name
        self.end(name, "actor_failed", f"{name} failed: {failure}")
        if member.state == "draining":
            return
        failures = self._failures[name] = self._failures.get(name, 0) + 1
        self._retry_at_s[name] = now_s + min(MAX_BACKOFF_S, 2.0 ** (failures - 1))
        if failures <= self._settings.max_restarts and not failure.in_vain:
            return
        if any(other.state == "running" for other in self._members.values()):
            self.desired -= 1
            message = f"gave up on {name}; the run goes on with {self.desired} actors"
            self._note("actor_given_up", name, message)
        else:
            self._refused = failure.in_vain
            times = "" if failure.in_vain else f" {failures} times in a row, the last time"
            self._failure = f"{name} failed{times}: {failure}"
