"""A rollout actor without vLLM and without Ray: what it decides is decided as in `actors.rollout_actor`."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from actors.engine.action_log import FinishedLog, logs_to_batch
from actors.engine.settings import SamplingSettings
from actors.rollout_rules import (
    DEMAND_POLL_S,
    GENERATING,
    IDLE_WAIT_S,
    MAX_BYTES_IN_FLIGHT,
    STARTING,
    finishes_first,
    hand_over_due,
    has_room,
    rollout_activity,
    shard_in_turn,
)
from actors.settings import ActorsSettings
from actors.status import ActorStatus
from buffer.service.service import InsertReply
from buffer.trajectory.schema import trajectory_schema
from launch.bench.buffer_load import CONTRACT
from launch.bench.scaling_engine import SimulatedEngine
from launch.bench.scaling_shards import EPOCH_S, SimulatedShard, WeightLink
from launch.bench.scaling_times import StepTimes

LOADING = "loading weights"
INSERTING = "waiting for the buffer"
_CREATED_AT = trajectory_schema(CONTRACT).get_field_index("created_at")


@dataclass(frozen=True)
class _Insert:
    shard: int
    reply: asyncio.Task[InsertReply]
    size_bytes: int


class SimulatedWriter:
    """`buffer.service.client.BufferClient` with tasks in the place of calls through Ray."""

    def __init__(self, shards: Sequence[SimulatedShard], first: int) -> None:
        self._shards = {shard.index: shard for shard in shards}
        self._turn = first
        self._inserts: list[_Insert] = []
        self._demands: dict[int, asyncio.Task[bool]] = {}

    async def insert(self, batch: pa.RecordBatch) -> None:
        """Send a batch; waits while more than the allowed inserts or bytes would be unanswered."""
        while not has_room(batch.nbytes, [each.size_bytes for each in self._inserts], MAX_BYTES_IN_FLIGHT):
            await self._inserts[0].reply
            self._heed_answers()
        index = shard_in_turn(self._turn, list(self._shards), self._demands)
        self._turn += 1
        reply = asyncio.create_task(self._shards[index].insert(batch))
        self._inserts.append(_Insert(index, reply, batch.nbytes))

    def held_back(self) -> bool:
        """Whether every shard has asked for a pause."""
        self._heed_answers()
        return len(self._demands) == len(self._shards)

    async def settle(self) -> None:
        """Wait until every insert is answered."""
        await asyncio.gather(*(each.reply for each in self._inserts))
        self._heed_answers()

    def _heed_answers(self) -> None:
        answered = [each for each in self._inserts if each.reply.done()]
        self._inserts = [each for each in self._inserts if not each.reply.done()]
        for insert in answered:
            reply = insert.reply.result()
            assert not reply.rejections, "simulated rollouts are good ones"
            if reply.pause and insert.shard not in self._demands:
                self._ask_for_demand(insert.shard)
        for index, demand in list(self._demands.items()):
            if demand.done():
                del self._demands[index]
                if not demand.result():
                    self._ask_for_demand(index)

    def _ask_for_demand(self, index: int) -> None:
        self._demands[index] = asyncio.create_task(self._shards[index].wait_for_demand(DEMAND_POLL_S))


class SimulatedActor:
    """Generates until drained; the methods that leave word are those of the real one."""

    def __init__(
        self,
        name: str,
        number: int,
        settings: ActorsSettings,
        times: StepTimes,
        shards: Sequence[SimulatedShard],
        link: WeightLink,
        seed: tuple[int, ...],
    ) -> None:
        """number: of its place in the pool. seed: of the lengths of its rollouts."""
        self._name = name
        self._number = number
        self._settings = settings
        self._times = times
        self._link = link
        self._engine = SimulatedEngine(times, "-".join([name, *map(str, seed)]), seed)
        self._writer = SimulatedWriter(shards, number)
        self._sampling = SamplingSettings(settings.rollout.max_new_tokens, settings.rollout.max_actions)
        self._announced = self._version = -1
        self._paused = self._draining = False
        self._first_version = 0
        self._finished: list[FinishedLog] = []
        self._trajectories = 0
        self._activity = STARTING
        self.actions = 0
        """Since birth."""
        self.spent_s: defaultdict[str, float] = defaultdict(float)
        """Time by activity, since birth."""

    def announce(self, version: int) -> None:
        """Leave word of new weights."""
        self._announced = max(self._announced, version)

    def set_paused(self, paused: bool, first_version: int) -> None:
        """Start no new rollouts while paused, nor with weights older than `first_version`."""
        self._paused = paused
        self._first_version = first_version

    def drain(self) -> None:
        """Finish what is under way, hand it over, and let `run` return."""
        self._draining = True

    def status(self) -> ActorStatus:
        """As the pool asks for it."""
        return ActorStatus(
            name=self._name,
            policy_version=self._version,
            actions=self.actions,
            actions_per_s=0.0,  # nobody looks at these three
            backspaces=0,
            rejected=0,
            trajectories=self._trajectories,
            in_flight=self._engine.num_unfinished,
            activity=self._activity,
        )

    async def run(self) -> None:
        """Generate until drained."""
        while True:
            unfinished = self._engine.num_unfinished
            finishing = finishes_first(self._settings.weight_update, self._announced, self._version, unfinished)
            if self._announced > self._version and not finishing:
                await self._load_weights()
            self._activity = rollout_activity(
                self._version, self._first_version, self._draining, self._paused, self._writer.held_back, finishing
            )
            if self._activity == GENERATING:
                self._engine.add(self._settings.max_concurrent - self._engine.num_unfinished)
            if self._engine.num_unfinished:
                await self._spend(GENERATING, self._engine.next_step_s())
                self._collect(self._engine.step())
            elif self._draining:
                break
            else:
                await self._spend(self._activity, IDLE_WAIT_S)
            if hand_over_due(len(self._finished), self._engine.num_unfinished, self._settings.insert_rows):
                await self._hand_over()
        await self._hand_over()
        await self._writer.settle()

    async def _load_weights(self) -> None:
        await self._hand_over()
        version = self._announced
        started_s = _now_s()
        await self._link.fetch(version, self._number)
        await asyncio.sleep(self._times.load_weights_s)
        self.spent_s[LOADING] += _now_s() - started_s
        self._engine.load_weights(version)
        self._version = version

    def _collect(self, logs: list[FinishedLog]) -> None:
        self.actions += sum(len(log.actions) for log in logs)
        self._trajectories += len(logs)
        self._finished += logs

    async def _hand_over(self) -> None:
        if not self._finished:
            return
        batch = logs_to_batch(
            self._finished,
            CONTRACT,
            task="simulation",
            actor=self._name,
            sampling=self._sampling,
            weights_fingerprint=str(self._version),
        )
        self._finished = []
        created_us = pa.array([int((EPOCH_S + _now_s()) * 1e6)] * batch.num_rows, pa.int64())
        created = created_us.cast(batch.schema.field(_CREATED_AT).type)
        started_s = _now_s()
        await self._writer.insert(batch.set_column(_CREATED_AT, batch.schema.field(_CREATED_AT), created))
        self.spent_s[INSERTING] += _now_s() - started_s

    async def _spend(self, activity: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self.spent_s[activity] += seconds


def _now_s() -> float:
    return asyncio.get_running_loop().time()
