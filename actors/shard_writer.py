"""How a rollout actor hands its trajectories to the replay buffer.

Inserts are sent without waiting, in turn to the shards that are nearest (on the same node, else all), and answered
while the engine works on. Inserts that no shard has answered yet are bounded, in number and in bytes: beyond that the
actor waits, so neither its memory nor the object store nor a shard's queue grows when the buffer is slow.

A shard that died is restarted by Ray, which sends the unanswered inserts again, each to the shard it was for: a
trajectory that is stored there already counts as accepted, since its id is known. It is never sent to another shard,
which could not know that.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa
import ray

from actors.rollout_rules import DEMAND_POLL_S, MAX_BYTES_IN_FLIGHT, has_room, shard_in_turn
from buffer.service.service import InsertReply
from buffer.service.shard import BufferLostError, Shard
from buffer.service.transport import compact

INSERT_TIMEOUT_S = 120.0
"""Of one insert; a shard that is restarted needs some seconds, and more where its folder is large."""

T = TypeVar("T")


@dataclass(frozen=True)
class _Insert:
    shard: Shard
    reference: ray.ObjectRef[InsertReply]
    size_bytes: int
    sent_at_s: float


class ShardWriter:
    """The inserts of one actor. Not thread-safe."""

    def __init__(
        self, actor: str, shards: Sequence[Shard], first: int, max_bytes_in_flight: int = MAX_BYTES_IN_FLIGHT
    ) -> None:
        """Args:
        actor: name, for messages.
        shards: those to write to, all equally near.
        first: which of them takes the first insert (modulo their number), so that actors begin with different ones.
        max_bytes_in_flight: bytes that may be unanswered; a larger batch is sent alone.
        """
        self._actor = actor
        self._shards = list(shards)
        self._turn = first
        self._max_bytes_in_flight = max_bytes_in_flight
        self._inserts: list[_Insert] = []
        self._demands: dict[int, ray.ObjectRef[bool]] = {}  # of shards that asked for a pause
        self.accepted = 0
        self.rejected = 0

    @property
    def bytes_in_flight(self) -> int:
        """Bytes of inserts that are not answered yet."""
        return sum(insert.size_bytes for insert in self._inserts)

    def insert(self, batch: pa.RecordBatch) -> None:
        """Send a batch; waits while more than the allowed inserts or bytes would be unanswered.

        Raises:
            TimeoutError: a shard did not answer in time. BufferLostError: it is gone for good.
        """
        batch = compact(batch)
        while not has_room(batch.nbytes, [each.size_bytes for each in self._inserts], self._max_bytes_in_flight):
            self._settle_one()
        shard = self._next_shard()
        reference = shard.handle.insert.remote(batch)
        self._inserts.append(_Insert(shard, reference, batch.nbytes, time.monotonic()))

    def held_back(self) -> bool:
        """Whether every shard that this actor writes to has asked it to pause. Heeds answers; never waits."""
        self._heed_answers()
        return len(self._demands) == len(self._shards)

    def settle(self) -> None:
        """Wait until every insert is answered.

        Raises:
            TimeoutError: a shard did not answer in time. BufferLostError: it is gone for good.
        """
        while self._inserts:
            self._settle_one()

    def _next_shard(self) -> Shard:
        index = shard_in_turn(self._turn, [shard.index for shard in self._shards], self._demands)
        self._turn += 1
        return next(shard for shard in self._shards if shard.index == index)

    def _settle_one(self) -> None:
        """Wait for the oldest insert."""
        oldest = self._inserts[0]
        left_s = max(oldest.sent_at_s + INSERT_TIMEOUT_S - time.monotonic(), 0.0)
        if not ray.wait([oldest.reference], timeout=left_s)[0]:
            raise TimeoutError(
                f"{self._actor} waited {INSERT_TIMEOUT_S:.0f} s for {oldest.shard.name} to take a batch of "
                f"{oldest.size_bytes:,} bytes"
            )
        self._heed_answers()

    def _heed_answers(self) -> None:
        references = [insert.reference for insert in self._inserts]
        if references:
            done = set(ray.wait(references, num_returns=len(references), timeout=0)[0])
            answered = [insert for insert in self._inserts if insert.reference in done]
            self._inserts = [insert for insert in self._inserts if insert.reference not in done]
            for insert in answered:
                reply = _answer(InsertReply, insert.shard, insert.reference)
                self.accepted += reply.accepted
                self.rejected += len(reply.rejections)
                if reply.pause and insert.shard.index not in self._demands:
                    self._demands[insert.shard.index] = self._ask_for_demand(insert.shard)
        for shard in self._shards:
            reference = self._demands.get(shard.index)
            if reference is None or not ray.wait([reference], timeout=0)[0]:
                continue
            if _answer(bool, shard, reference):
                del self._demands[shard.index]
            else:
                self._demands[shard.index] = self._ask_for_demand(shard)

    def _ask_for_demand(self, shard: Shard) -> ray.ObjectRef[bool]:
        reference: ray.ObjectRef[bool] = shard.handle.wait_for_demand.remote(timeout_s=DEMAND_POLL_S)
        return reference


def _answer(kind: type[T], shard: Shard, reference: ray.ObjectRef[T]) -> T:
    """The value of a call that is done."""
    try:
        value = ray.get(reference, timeout=INSERT_TIMEOUT_S)
    except ray.exceptions.RayActorError as error:
        raise BufferLostError(f"{shard.name} died: {str(error).splitlines()[0]}") from None
    assert isinstance(value, kind)
    return value
