"""The pool of rollout actors: how many there are, their health, and the newest weights for each.

What becomes of a member is decided by `actors.pool.roster`; its process is in the hands of `actors.pool.ray_crew`. The
pool is an asyncio Ray actor, so a call on it returns at once whatever its members do: the learner announces weights
without waiting, and `sequencematch scale` works from any shell of the cluster.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence

import ray

from actors.pool.ray_crew import RayCrew
from actors.pool.roster import Roster
from actors.rollout_actor import RolloutSpec
from actors.rollout_rules import SUPERVISION_INTERVAL_S
from actors.status import PoolEvent, PoolEventKind, PoolStatus
from buffer.service.shard import Shard
from buffer.stop_signals import ignore_stop_signals
from buffer.weights.format import WeightManifest
from buffer.weights.object_store import WeightHandle

MAX_EVENTS = 200


class ActorPool:
    """Keeps `desired` rollout actors alive and hands each the newest weights."""

    def __init__(
        self,
        spec: RolloutSpec,
        prompts: list[ray.ObjectRef],
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
        ignore_stop_signals()
        self._crew = RayCrew(spec, prompts, shards, environment)
        self._events: deque[PoolEvent] = deque(maxlen=MAX_EVENTS)
        self._num_events = 0
        self._roster = Roster(desired, spec.settings, self._crew, self._note)
        self._stopping = False
        self._supervisor: asyncio.Task[None] | None = None

    async def start(self, nodes: Sequence[str] = ()) -> None:
        """Begin supervision; returns before the first actor is ready.

        nodes: id of the node planned for each actor, by its number. Ray chooses the node of an actor without one.
        """
        self._crew.nodes = nodes
        if self._supervisor is None:
            self._supervisor = asyncio.create_task(self._supervise())

    async def scale(self, desired: int) -> PoolStatus:
        """Set the number of actors. New ones take the newest weights at birth; surplus ones drain and leave."""
        self._roster.scale(desired)
        return await self.status()

    async def announce(self, manifest: WeightManifest, handle: WeightHandle) -> None:
        """Tell every running actor of new weights; only the newest announcement is kept for late joiners."""
        self._crew.announce(manifest, handle)

    async def pause(self) -> None:
        """No new rollouts until `resume`: a stage that needs none leaves the cores to the learner."""
        self._crew.set_paused(True)

    async def resume(self, first_version: int) -> None:
        """Rollouts again, with weights of `first_version` (those the stage starts with) or newer."""
        self._crew.set_paused(False, first_version)

    async def status(self) -> PoolStatus:
        """Counts and the last known status of every member."""
        if self._supervisor is not None and self._supervisor.done() and not self._stopping:
            self._supervisor.result()  # a defect in supervision must not look like a quiet pool
        return PoolStatus(
            desired=self._roster.desired,
            newest_version=self._crew.newest_version,
            members=self._roster.members(),
            events=tuple(self._events),
            failure=self._roster.failure,
            refused=self._roster.refused,
        )

    async def stop(self, timeout_s: float) -> None:
        """Drain every actor for at most `timeout_s` seconds, then end what is left."""
        self._stopping = True
        self._roster.close()
        deadline = time.monotonic() + timeout_s
        while self._roster.names and time.monotonic() < deadline:
            self._roster.reconcile(time.monotonic())
            await asyncio.sleep(0.05)
        for name in self._roster.names:
            self._roster.end(name, "actor_ended", f"{name} ended by force: it did not drain within {timeout_s:.0f} s")
        if self._supervisor is not None:
            self._supervisor.cancel()

    async def _supervise(self) -> None:
        while not self._stopping:
            for name, status in (await self._crew.statuses()).items():
                self._roster.heard_from(name, status, time.monotonic())
            self._roster.reconcile(time.monotonic())
            await asyncio.sleep(SUPERVISION_INTERVAL_S)

    def _note(self, kind: PoolEventKind, actor: str, message: str) -> None:
        self._events.append(PoolEvent(self._num_events, kind, actor, message))
        self._num_events += 1
