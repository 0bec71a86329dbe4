"""Who is in the pool and what becomes of each member: decisions only, so that they can be tested and simulated.

A member's life:

    starting --ready--> running --drain--> draining --left--> gone
        |                  |                   |
        +-- error, silence or lost process ----+--> replaced after a back-off (or gone, where it was leaving)

The roster is told the time and asks its crew how members are; what it decides, the crew does at once, without waiting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from actors.rollout_rules import HELD_BACK, PAUSED, WAITING_FOR_WEIGHTS
from actors.settings import ActorsSettings
from actors.status import ActorStatus, MemberStatus, PoolEventKind

MAX_BACKOFF_S = 30.0


@dataclass(frozen=True)
class Failure:
    """Why a member cannot go on. in_vain: a successor would fail in the same way. traceback: the end of it, where the
    reason does not say what to do.
    """

    reason: str
    in_vain: bool = False
    traceback: str = ""

    def __str__(self) -> str:
        return f"{self.reason}; its traceback ends with\n{self.traceback}" if self.traceback else self.reason


Sighting = Literal["starting", "ready", "at work", "left"] | Failure
"""How a member is: its engine starts; it waits to be put to work; it works (or drains); it is done; it failed."""


class Crew(Protocol):
    """The actors behind the names. Nothing here waits."""

    def look(self, name: str) -> Sighting:
        """How a member is."""

    def spawn(self, name: str, number: int) -> None:
        """Begin to make an actor. number: of its place in the pool, from 0."""

    def put_to_work(self, name: str) -> None:
        """Hand a ready actor the newest weights and let it generate."""

    def drain(self, name: str) -> None:
        """Ask an actor to finish what is under way and to leave."""

    def end(self, name: str) -> None:
        """End an actor by force, or let go of one that has ended."""


@dataclass
class _Member:
    name: str
    state: Literal["starting", "running", "draining"]
    born_at_s: float
    drain_started_at_s: float = 0.0
    last_answer_at_s: float = 0.0
    status: ActorStatus | None = None
    join_s: float | None = None
    waited: bool = False  # for a stage, for weights or for the learner, before its first rollouts


OnEvent = Callable[[PoolEventKind, str, str], None]
"""Is told what happens: kind, name of the actor (empty for the pool), a sentence for people."""


class Roster:
    """Keeps `desired` members. Times are seconds on one clock that never goes back."""

    def __init__(self, desired: int, settings: ActorsSettings, crew: Crew, on_event: OnEvent) -> None:
        self._desired = desired
        self._settings = settings
        self._crew = crew
        self._on_event = on_event
        self._members: dict[str, _Member] = {}
        self._failures: dict[str, int] = {}  # in a row, by name
        self._retry_at_s: dict[str, float] = {}
        self._closed = False
        self.failure: str | None = None
        """Set when the pool has given up."""
        self.refused = False
        """It gave up because what actors are born with is wrong."""

    @property
    def desired(self) -> int:
        """Members that there should be; fewer than was asked for where the roster gave up on some."""
        return self._desired

    @property
    def names(self) -> list[str]:
        """Of all members, oldest first."""
        return list(self._members)

    def members(self) -> tuple[MemberStatus, ...]:
        """All members, oldest first, with what they last told."""
        return tuple(
            MemberStatus(member.name, member.state, self._failures.get(member.name, 0), member.status, member.join_s)
            for member in self._members.values()
        )

    def scale(self, desired: int) -> None:
        """Change the number of members; takes effect at the next `reconcile`.

        Raises:
            ValueError: the number is negative.
        """
        if desired < 0:
            raise ValueError(f"the number of actors cannot be negative, got {desired}")
        self._on_event("pool_scaled", "", f"scale {self._desired} -> {desired}")
        self._desired = desired

    def close(self) -> None:
        """From now on every member is surplus, and none is made any more."""
        self._closed = True
        self._desired = 0

    def heard_from(self, name: str, status: ActorStatus, now_s: float) -> None:
        """A member has answered; one that has left meanwhile is passed over."""
        member = self._members.get(name)
        if member is None:
            return
        self._measure_join(member, status, now_s)
        member.status = status
        member.last_answer_at_s = now_s
        if status.trajectories > 0:
            self._failures.pop(name, None)

    def reconcile(self, now_s: float) -> None:
        """Move every member along its life, then drain or make members until there are as many as desired."""
        for member in list(self._members.values()):
            self._advance(member, self._crew.look(member.name), now_s)
        staying = [member for member in self._members.values() if member.state != "draining"]
        for member in staying[self._desired :]:
            self._drain(member, now_s)
        if self.failure is None and not self._closed:
            self._fill(now_s, self._desired - len(staying))

    def end(self, name: str, kind: PoolEventKind, message: str) -> None:
        """End a member by force."""
        del self._members[name]
        self._crew.end(name)
        self._on_event(kind, name, message)

    def _advance(self, member: _Member, seen: Sighting, now_s: float) -> None:
        settings = self._settings
        if isinstance(seen, Failure):
            self._fail(member, seen, now_s)
        elif seen == "left":
            self.end(member.name, "actor_left", f"{member.name} left")
        elif member.state == "starting":
            if seen == "ready":
                self._put_to_work(member, now_s)
            elif now_s - member.born_at_s > settings.start_timeout_s:
                self._fail(member, Failure(f"its engine did not start within {settings.start_timeout_s:.0f} s"), now_s)
        elif now_s - member.last_answer_at_s > settings.health_timeout_s:
            self._fail(member, Failure(f"silent for {settings.health_timeout_s:.0f} s"), now_s)
        elif member.state == "draining" and now_s - member.drain_started_at_s > settings.drain_timeout_s:
            message = f"{member.name} ended by force: not drained in {settings.drain_timeout_s:.0f} s"
            self.end(member.name, "actor_ended", message)

    def _put_to_work(self, member: _Member, now_s: float) -> None:
        self._crew.put_to_work(member.name)
        member.state = "running"
        member.last_answer_at_s = now_s
        self._on_event("actor_ready", member.name, f"{member.name} ready after {now_s - member.born_at_s:.1f} s")

    def _measure_join(self, member: _Member, status: ActorStatus, now_s: float) -> None:
        """Take the time to the first rollouts; of an actor that is made to wait it would tell nothing of joining."""
        if member.join_s is not None or member.waited:
            return
        if status.trajectories > 0:
            member.join_s = now_s - member.born_at_s
            message = f"{member.name} joined: first rollouts after {member.join_s:.1f} s"
            self._on_event("actor_joined", member.name, message)
        else:
            member.waited = status.activity in (WAITING_FOR_WEIGHTS, PAUSED, HELD_BACK)

    def _drain(self, member: _Member, now_s: float) -> None:
        if member.state == "starting":
            self.end(member.name, "actor_ended", f"{member.name} removed before it was ready")
            return
        member.state = "draining"
        member.drain_started_at_s = now_s
        self._crew.drain(member.name)
        self._on_event("actor_draining", member.name, f"{member.name} draining")

    def _fill(self, now_s: float, missing: int) -> None:
        number = 0
        while missing > 0:
            name = f"actor-{number}"
            if name not in self._members:
                missing -= 1
                if now_s >= self._retry_at_s.get(name, 0.0):
                    self._crew.spawn(name, number)
                    self._members[name] = _Member(name, "starting", born_at_s=now_s)
                    self._on_event("actor_starting", name, f"{name} starting")
            number += 1

    def _fail(self, member: _Member, failure: Failure, now_s: float) -> None:
        """Remove a member that failed, and plan its successor."""
        name = member.name
        self.end(name, "actor_failed", f"{name} failed: {failure}")
        if member.state == "draining":
            return
        failures = self._failures[name] = self._failures.get(name, 0) + 1
        self._retry_at_s[name] = now_s + min(MAX_BACKOFF_S, 2.0 ** (failures - 1))
        if failures <= self._settings.max_restarts and not failure.in_vain:
            return
        if any(other.state == "running" for other in self._members.values()):
            self._desired -= 1
            message = f"gave up on {name}; the run goes on with {self._desired} actors"
            self._on_event("actor_given_up", name, message)
        else:
            self.refused = failure.in_vain
            times = "" if failure.in_vain else f" {failures} times in a row, the last time"
            self.failure = f"{name} failed{times}: {failure}"
