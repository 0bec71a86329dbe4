"""The pool of simulated actors: the real roster decides, and its crew lives on a virtual clock."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from actors.pool.autoscaler import Autoscaler, Observation
from actors.pool.roster import Roster, Sighting
from actors.rollout_rules import SUPERVISION_INTERVAL_S
from actors.settings import ActorsSettings
from actors.status import PoolStatus
from buffer.service.status import BufferStatus
from launch.bench.scaling_actor import SimulatedActor
from launch.bench.scaling_shards import SimulatedShard, WeightLink
from launch.bench.scaling_times import StepTimes


@dataclass
class _Hand:
    actor: SimulatedActor
    ready_at_s: float
    run: asyncio.Task[None] | None = None
    leaving: bool = False


class SimulatedCrew:
    """What `actors.pool.ray_crew.RayCrew` is to Ray, on the clock of the running loop."""

    def __init__(self, settings: ActorsSettings, times: StepTimes, shards: Sequence[SimulatedShard], seed: int) -> None:
        self._settings = settings
        self._times = times
        self._shards = shards
        self._seed = seed
        self._link = WeightLink(times)
        self._hands: dict[str, _Hand] = {}
        self._births = 0
        self._past_actions = 0
        self._past_s: defaultdict[str, float] = defaultdict(float)
        self.newest_version = -1

    @property
    def actors(self) -> dict[str, SimulatedActor]:
        """Those at work, by name."""
        return {name: hand.actor for name, hand in self._hands.items() if hand.run is not None}

    @property
    def actions(self) -> int:
        """Of all actors that there ever were."""
        return self._past_actions + sum(hand.actor.actions for hand in self._hands.values())

    @property
    def spent_s(self) -> dict[str, float]:
        """Time by activity, of all actors that there ever were."""
        total_s = self._past_s.copy()
        for hand in self._hands.values():
            _add(total_s, hand.actor.spent_s)
        return total_s

    def announce(self, version: int) -> None:
        """Tell every actor at work of new weights."""
        self.newest_version = version
        for hand in self._hands.values():
            if hand.run is not None and not hand.leaving:
                hand.actor.announce(version)

    def look(self, name: str) -> Sighting:
        """See `actors.pool.roster.Crew`."""
        hand = self._hands[name]
        if hand.run is None:
            return "ready" if asyncio.get_running_loop().time() >= hand.ready_at_s else "starting"
        if not hand.run.done():
            return "at work"
        hand.run.result()  # a simulated actor that fails is a defect
        return "left"

    def spawn(self, name: str, number: int) -> None:
        """See `actors.pool.roster.Crew`."""
        seed = (self._seed, number, self._births)
        self._births += 1
        actor = SimulatedActor(name, number, self._settings, self._times, self._shards, self._link, seed)
        self._hands[name] = _Hand(actor, asyncio.get_running_loop().time() + self._times.start_actor_s)

    def put_to_work(self, name: str) -> None:
        """See `actors.pool.roster.Crew`."""
        hand = self._hands[name]
        hand.actor.announce(self.newest_version)
        hand.actor.set_paused(False, first_version=0)
        hand.run = asyncio.create_task(hand.actor.run())

    def drain(self, name: str) -> None:
        """See `actors.pool.roster.Crew`."""
        hand = self._hands[name]
        hand.leaving = True
        hand.actor.drain()

    def end(self, name: str) -> None:
        """See `actors.pool.roster.Crew`."""
        hand = self._hands.pop(name)
        self._past_actions += hand.actor.actions
        _add(self._past_s, hand.actor.spent_s)
        if hand.run is not None:
            hand.run.cancel()


class SimulatedPool:
    """`actors.pool.pool.ActorPool` without Ray."""

    def __init__(
        self, desired: int, settings: ActorsSettings, times: StepTimes, shards: Sequence[SimulatedShard], seed: int
    ) -> None:
        self.crew = SimulatedCrew(settings, times, shards, seed)
        self.events: list[str] = []
        self.roster = Roster(desired, settings, self.crew, lambda *event: self.events.append(event[-1]))
        self._shards = shards
        self._autoscaler = None if settings.autoscale is None else Autoscaler(settings.autoscale)

    @property
    def complete(self) -> bool:
        """Whether as many actors are at work as are desired."""
        states = [member.state for member in self.roster.members()]
        return states == ["running"] * self.roster.desired

    async def supervise(self) -> None:
        """Until cancelled."""
        while True:
            self._look_once()
            if self._autoscaler is not None:
                await self._autoscale(self._autoscaler)
            await asyncio.sleep(SUPERVISION_INTERVAL_S)

    async def stop(self) -> None:
        """Drain every actor."""
        self.roster.close()
        while self.roster.names:
            self._look_once()
            await asyncio.sleep(0.05)

    async def _autoscale(self, autoscaler: Autoscaler) -> None:
        """What the driver of a run does."""
        buffer = BufferStatus(tuple([await shard.service.status() for shard in self._shards]))
        pool = PoolStatus(self.roster.desired, self.crew.newest_version, self.roster.members())
        now_s = asyncio.get_running_loop().time()
        wanted = autoscaler.observe(Observation.of(now_s, pool, draw_waits=buffer.waiting_draws > 0))
        if wanted is not None:
            self.roster.scale(wanted)

    def _look_once(self) -> None:
        now_s = asyncio.get_running_loop().time()
        for name, actor in self.crew.actors.items():
            self.roster.heard_from(name, actor.status(), now_s)
        self.roster.reconcile(now_s)


def _add(total_s: dict[str, float], spent_s: dict[str, float]) -> None:
    for activity, seconds in spent_s.items():
        total_s[activity] = total_s.get(activity, 0.0) + seconds
