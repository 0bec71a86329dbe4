"""The pool's actors as Ray processes: making them, leaving word with them, seeing how they are."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.engine.rank_group import EngineRankError
from actors.pool.roster import Failure, Sighting
from actors.rollout_actor import RolloutActor, RolloutSpec
from actors.status import ActorStatus
from buffer.service.shard import Shard
from buffer.weights.format import WeightManifest
from buffer.weights.object_store import WeightHandle

STATUS_TIMEOUT_S = 5.0
TRACEBACK_CHARACTERS = 1500
ANSI_COLOR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass
class _Hand:
    handle: ActorHandle
    ready: asyncio.Task[object]
    run: asyncio.Task[object] | None = None
    leaving: bool = False


class RayCrew:
    """Rollout actors by name. Lives on an event loop; no method waits for an actor, but `statuses`."""

    def __init__(
        self, spec: RolloutSpec, prompts: list[ray.ObjectRef], shards: Sequence[Shard], environment: dict[str, str]
    ) -> None:
        """See `actors.pool.pool.ActorPool`."""
        self._spec = spec
        self._prompts = prompts
        self._shards = shards
        self._environment = environment
        self.nodes: Sequence[str] = ()
        """Id of the node that the plan has for each actor, by its number."""
        self._hands: dict[str, _Hand] = {}
        self._newest: tuple[WeightManifest, WeightHandle] | None = None
        self._paused = False
        self._first_version = 0

    @property
    def newest_version(self) -> int:
        """Of the weights that were announced last; -1 before any."""
        return -1 if self._newest is None else self._newest[0].version

    def announce(self, manifest: WeightManifest, handle: WeightHandle) -> None:
        """Tell every actor at work of new weights; only the newest announcement is kept for late joiners.

        Raises:
            ValueError: they are not newer than those before.
        """
        if manifest.version <= self.newest_version:
            raise ValueError(f"weights version {manifest.version} announced after version {self.newest_version}")
        self._newest = (manifest, handle)
        for hand in self._at_work():
            _control(hand.handle.announce, manifest, handle)

    def set_paused(self, paused: bool, first_version: int | None = None) -> None:
        """No new rollouts while paused, nor with weights older than `first_version` (None: as before)."""
        self._paused = paused
        if first_version is not None:
            self._first_version = first_version
        for hand in self._at_work():
            _control(hand.handle.set_paused, paused, self._first_version)

    async def statuses(self) -> dict[str, ActorStatus]:
        """Of the actors that answer in time."""
        working = {name: hand for name, hand in self._hands.items() if hand.run is not None}
        answers = await asyncio.gather(
            *(asyncio.wait_for(_result(_control(hand.handle.status)), STATUS_TIMEOUT_S) for hand in working.values()),
            return_exceptions=True,
        )
        return {name: answer for name, answer in zip(working, answers, strict=True) if isinstance(answer, ActorStatus)}

    # What the roster asks for

    def look(self, name: str) -> Sighting:
        """See `actors.pool.roster.Crew`."""
        hand = self._hands[name]
        call = hand.ready if hand.run is None else hand.run
        if not call.done():
            return "starting" if hand.run is None else "at work"
        error = call.exception()
        if error is not None:
            return failure_of(error, starting=hand.run is None)
        return "ready" if hand.run is None else "left"

    def spawn(self, name: str, number: int) -> None:
        """See `actors.pool.roster.Crew`."""
        settings = self._spec.settings
        needs = settings.needs()
        planned = self.nodes[number] if number < len(self.nodes) else ""
        unplanned = "SPREAD" if settings.placement == "spread" else "DEFAULT"
        handle = (
            ray.remote(concurrency_groups={"generation": 1, "control": 4})(RolloutActor)
            .options(
                scheduling_strategy=at_best_on(planned) if planned else unplanned,
                num_cpus=needs.pop("CPU"),
                num_gpus=needs.pop("GPU"),
                resources=needs,
                runtime_env={"env_vars": self._environment},
                max_restarts=0,  # the pool replaces actors itself, with the newest weights
            )
            .remote(name, self._spec, self._prompts[0], self._shards, number)
        )
        self._hands[name] = _Hand(handle, asyncio.create_task(_result(_control(handle.ready))))

    def put_to_work(self, name: str) -> None:
        """See `actors.pool.roster.Crew`."""
        hand = self._hands[name]
        if self._newest is not None:
            _control(hand.handle.announce, *self._newest)
        _control(hand.handle.set_paused, self._paused, self._first_version)
        run = hand.handle.run.options(concurrency_group="generation").remote()
        hand.run = asyncio.create_task(_result(run))

    def drain(self, name: str) -> None:
        """See `actors.pool.roster.Crew`."""
        hand = self._hands[name]
        hand.leaving = True
        _control(hand.handle.drain)

    def end(self, name: str) -> None:
        """See `actors.pool.roster.Crew`."""
        ray.kill(self._hands.pop(name).handle)

    def _at_work(self) -> Iterator[_Hand]:
        return (hand for hand in self._hands.values() if hand.run is not None and not hand.leaving)


def at_best_on(node_id: str) -> object:
    """Ray's scheduling strategy for a process: on that node while it lives and has capacity, else on another one."""
    return NodeAffinitySchedulingStrategy(node_id, soft=True, _spill_on_unavailable=True)


def _control(method: ray.actor.ActorMethod, *arguments: object) -> ray.ObjectRef:
    """Call beside the generation loop, which occupies the group of its own."""
    return method.options(concurrency_group="control").remote(*arguments)


async def _result(reference: ray.ObjectRef) -> object:
    return await reference


def failure_of(error: BaseException, starting: bool) -> Failure:
    """The error a call ended with, and the end of its traceback. An actor whose constructor raised will raise the next
    time, too.
    """
    text = ANSI_COLOR.sub("", str(error)).strip()
    if isinstance(error, ray.exceptions.RayActorError) and error.actor_init_failed:
        # The rest is the traceback of the constructor.
        reason = text.splitlines()[-1]
        # A process of a divided engine that dies early is like an actor that does: it may live the next time.
        in_vain = starting and EngineRankError.__name__ not in reason
        # Our own refusals say all.
        return Failure(reason, in_vain, "" if reason.startswith(ValueError.__name__) else _end_of(text))
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    return Failure(f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0]}", traceback=_end_of(text))


def _end_of(text: str) -> str:
    """Whole lines, where there are several; a compiler's own words stand near the end."""
    if len(text) <= TRACEBACK_CHARACTERS:
        return text
    end = text[-TRACEBACK_CHARACTERS:]
    return end.partition("\n")[2] or end
