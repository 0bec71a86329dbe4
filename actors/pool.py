"""The pool of rollout actors: how many there are, their health, and the newest weights for each.

A member's life:

    starting --ready--> running --drain--> draining --run() returns--> gone
        |                  |                   |
        +-- error, silence or lost process ----+--> replaced after a back-off (or gone, where it was leaving)

The pool is an asyncio Ray actor, so a call on it returns at once whatever its members do: the learner announces
weights without waiting, and `sequencematch scale` works from any shell of the cluster.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import ray
from ray.actor import ActorHandle

from actors.rollout_actor import RolloutActor, RolloutSpec
from actors.status import ActorStatus, MemberStatus, PoolStatus
from buffer.shards.shard import Shard
from buffer.weights import WeightManifest, WeightPayload

SUPERVISION_INTERVAL_S = 0.5
STATUS_TIMEOUT_S = 5.0
MAX_BACKOFF_S = 30.0
MAX_EVENTS = 200


@dataclass
class _Member:
    name: str
    handle: ActorHandle
    ready: asyncio.Task[object]
    state: str
    born_at: float
    run: asyncio.Task[object] | None = None
    drain_started_at: float = 0.0
    last_answer_at: float = 0.0
    status: ActorStatus | None = None


class ActorPool:
    """Keeps `desired` rollout actors alive and hands each the newest weights."""

    def __init__(
        self,
        spec: RolloutSpec,
        prompts: ray.ObjectRef,
        shards: Sequence[Shard],
        environment: dict[str, str],
        desired: int,
    ) -> None:
        """Args:
        spec: what every actor is born with.
        prompts: list with one reference to the Arrow table of training examples (kept in the object store).
        shards: of the replay buffer.
        environment: environment variables of the actor processes.
        desired: actors to start with.
        """
        self._spec = spec
        self._prompts = prompts
        self._shards = shards
        self._environment = environment
        self._desired = desired
        self._members: dict[str, _Member] = {}
        self._failures: dict[str, int] = {}  # failures in a row, by name
        self._retry_at: dict[str, float] = {}
        self._newest: tuple[WeightManifest, list[ray.ObjectRef[WeightPayload]]] | None = None
        self._paused = False
        self._first_version = 0
        self._stopping = False
        self._failure: str | None = None
        self._refused = False
        self._events: deque[str] = deque(maxlen=MAX_EVENTS)
        self._supervisor: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin supervision; returns before the first actor is ready."""
        if self._supervisor is None:
            self._supervisor = asyncio.create_task(self._supervise())

    async def scale(self, desired: int) -> PoolStatus:
        """Set the number of actors. New ones take the newest weights at birth; surplus ones drain and leave."""
        if desired < 0:
            raise ValueError(f"the number of actors cannot be negative, got {desired}")
        self._note(f"scale {self._desired} -> {desired}")
        self._desired = desired
        return await self.status()

    async def announce(self, manifest: WeightManifest, payload: list[ray.ObjectRef[WeightPayload]]) -> None:
        """Tell every running actor of new weights; only the newest announcement is kept for late joiners.

        The payload reference travels in a list, so that Ray does not fetch the bytes into the pool.
        """
        if self._newest is not None and manifest.version <= self._newest[0].version:
            raise ValueError(f"weights version {manifest.version} announced after version {self._newest[0].version}")
        self._newest = (manifest, payload)
        for member in self._members.values():
            if member.state == "running":
                _control(member.handle.announce, manifest, payload)

    async def pause(self) -> None:
        """No new rollouts until `resume`: a stage that needs none leaves the cores to the learner."""
        self._tell_paused(True)

    async def resume(self, first_version: int) -> None:
        """Rollouts again, with weights of `first_version` (those the stage starts with) or newer."""
        self._first_version = first_version
        self._tell_paused(False)

    def _tell_paused(self, paused: bool) -> None:
        self._paused = paused
        for member in self._members.values():
            if member.state == "running":
                _control(member.handle.set_paused, paused, self._first_version)

    async def status(self) -> PoolStatus:
        """Counts and the last known status of every member."""
        if self._supervisor is not None and self._supervisor.done() and not self._stopping:
            self._supervisor.result()  # a defect in supervision must not look like a quiet pool
        return PoolStatus(
            desired=self._desired,
            newest_version=-1 if self._newest is None else self._newest[0].version,
            members=tuple(
                MemberStatus(m.name, m.state, self._failures.get(m.name, 0), m.status) for m in self._members.values()
            ),
            events=tuple(self._events),
            failure=self._failure,
            refused=self._refused,
        )

    async def stop(self, timeout_s: float) -> None:
        """Drain every actor for at most `timeout_s` seconds, then end what is left."""
        self._stopping = True
        self._desired = 0
        deadline = time.monotonic() + timeout_s
        while self._members and time.monotonic() < deadline:
            await self._reconcile()
            await asyncio.sleep(0.05)
        for name in list(self._members):
            self._remove(name, f"{name} ended by force: it did not drain within {timeout_s:.0f} s")
        if self._supervisor is not None:
            self._supervisor.cancel()

    async def _supervise(self) -> None:
        while not self._stopping:
            await self._poll_status()
            await self._reconcile()
            await asyncio.sleep(SUPERVISION_INTERVAL_S)

    async def _poll_status(self) -> None:
        running = [m for m in self._members.values() if m.run is not None]
        answers = await asyncio.gather(
            *(asyncio.wait_for(_result(_control(m.handle.status)), STATUS_TIMEOUT_S) for m in running),
            return_exceptions=True,
        )
        for member, answer in zip(running, answers, strict=True):
            if isinstance(answer, ActorStatus):
                member.status = answer
                member.last_answer_at = time.monotonic()
                if answer.trajectories > 0:
                    self._failures.pop(member.name, None)

    async def _reconcile(self) -> None:
        now = time.monotonic()
        for member in list(self._members.values()):
            self._advance(member, now)
        staying = [m for m in self._members.values() if m.state != "draining"]
        for member in staying[self._desired :]:
            self._drain(member, now)
        if self._failure is None and not self._stopping:
            self._fill(now, self._desired - len(staying))

    def _fill(self, now: float, missing: int) -> None:
        number = 0
        while missing > 0:
            name = f"actor-{number}"
            number += 1
            if name in self._members:
                continue
            missing -= 1
            if now >= self._retry_at.get(name, 0.0):
                self._spawn(name, number - 1, now)

    def _spawn(self, name: str, number: int, now: float) -> None:
        settings = self._spec.settings
        handle = (
            ray.remote(concurrency_groups={"generation": 1, "control": 4})(RolloutActor)
            .options(
                num_cpus=settings.num_cpus,
                num_gpus=settings.num_gpus,
                resources=settings.resources,
                runtime_env={"env_vars": self._environment},
                max_restarts=0,  # the pool replaces actors itself, with the newest weights
            )
            .remote(name, self._spec, self._prompts[0], self._shards, number)
        )
        ready = asyncio.create_task(_result(_control(handle.ready)))
        self._members[name] = _Member(name, handle, ready, "starting", born_at=now)
        self._note(f"{name} starting")

    def _advance(self, member: _Member, now: float) -> None:
        """Move one member along its life by what is known now, without waiting."""
        settings = self._spec.settings
        if member.run is None:
            error = _error_of(member.ready)
            if error is not None:
                self._fail(member, error, now, in_vain=_is_refusal(member.ready))
            elif member.ready.done():
                self._put_to_work(member, now)
            elif now - member.born_at > settings.start_timeout_s:
                self._fail(member, f"its engine did not start within {settings.start_timeout_s:.0f} s", now)
            return
        error = _error_of(member.run)
        if error is not None:
            self._fail(member, error, now)
        elif member.run.done():
            self._remove(member.name, f"{member.name} left")
        elif now - member.last_answer_at > settings.health_timeout_s:
            self._fail(member, f"silent for {settings.health_timeout_s:.0f} s", now)
        elif member.state == "draining" and now - member.drain_started_at > settings.drain_timeout_s:
            self._remove(member.name, f"{member.name} ended by force: not drained in {settings.drain_timeout_s:.0f} s")

    def _put_to_work(self, member: _Member, now: float) -> None:
        if self._newest is not None:
            _control(member.handle.announce, *self._newest)
        _control(member.handle.set_paused, self._paused, self._first_version)
        run = member.handle.run.options(concurrency_group="generation").remote()
        member.run = asyncio.create_task(_result(run))
        member.last_answer_at = now
        if member.state == "draining":  # it was told to leave while its engine started
            _control(member.handle.drain)
        else:
            member.state = "running"
        self._note(f"{member.name} ready after {now - member.born_at:.1f} s")

    def _drain(self, member: _Member, now: float) -> None:
        if member.run is None:
            self._remove(member.name, f"{member.name} removed before it was ready")
            return
        member.state = "draining"
        member.drain_started_at = now
        _control(member.handle.drain)
        self._note(f"{member.name} draining")

    def _fail(self, member: _Member, reason: str, now: float, in_vain: bool = False) -> None:
        """Remove a member that failed, and plan its successor. in_vain: a successor would fail in the same way."""
        leaving = member.state == "draining"
        self._remove(member.name, f"{member.name} failed: {reason}")
        if leaving:
            return
        failures = self._failures[member.name] = self._failures.get(member.name, 0) + 1
        self._retry_at[member.name] = now + min(MAX_BACKOFF_S, 2.0 ** (failures - 1))
        if failures <= self._spec.settings.max_restarts and not in_vain:
            return
        if any(other.state == "running" for other in self._members.values()):
            self._desired -= 1
            self._note(f"gave up on {member.name}; the run goes on with {self._desired} actors")
        else:
            self._refused = in_vain
            times = "" if in_vain else f" {failures} times in a row, the last time"
            self._failure = f"{member.name} failed{times}: {reason}"

    def _remove(self, name: str, event: str) -> None:
        ray.kill(self._members.pop(name).handle)
        self._note(event)

    def _note(self, event: str) -> None:
        self._events.append(f"{time.strftime('%H:%M:%S')} {event}")


def _control(method: ray.actor.ActorMethod, *arguments: object) -> ray.ObjectRef:
    """Call beside the generation loop, which occupies the group of its own."""
    return method.options(concurrency_group="control").remote(*arguments)


async def _result(reference: ray.ObjectRef) -> object:
    return await reference


def _error_of(task: asyncio.Task[object]) -> str | None:
    """The error a finished call ended with, as one line; None while it runs or where it succeeded."""
    if not task.done():
        return None
    error = task.exception()
    if error is None:
        return None
    if isinstance(error, ray.exceptions.RayActorError) and error.actor_init_failed:
        return str(error).strip().splitlines()[-1]  # the rest is the traceback of the constructor
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    return f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0]}"


def _is_refusal(task: asyncio.Task[object]) -> bool:
    """Whether an actor's constructor raised: what it is born with is wrong, and will be the next time."""
    error = task.exception()
    return isinstance(error, ray.exceptions.RayActorError) and error.actor_init_failed
