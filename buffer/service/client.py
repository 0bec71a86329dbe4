"""The client of a run's replay buffer: actors insert, the learner samples, the driver reads the status.

The client sends inserts to its shards in turn, without waiting. It bounds the number and the bytes of unanswered
inserts: beyond the bounds the caller waits.

Ray restarts a shard that died and sends the unanswered calls to it again. The shard knows the ids of the trajectories
that it has stored, and counts them as accepted. No call is sent to another shard, which could not know those ids.

Ray pickles a record batch column by column, with the column's buffers beside the pickle: no row becomes a Python
object, and the reader maps the buffers where they are. A *slice* is the exception: its pickle carries the whole buffers
of the batch that it was cut from (https://github.com/apache/arrow/issues/26685). So what is sent is made `compact`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from buffer.processes import NoAnswerError, ProcessLostError, RemoteCall, end_actor, ended_calls
from buffer.service.shard import BufferStatus, InsertReply, Offer, SampleRequest, ShardStatus, plan_parts
from buffer.store.shard import SampleResult

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from buffer.service.service import ReplayBufferService

ANSWER_TIMEOUT_S = 120.0
"""Added to the time that a call itself may wait: a shard needs time to restart, more with a large folder."""

DEMAND_POLL_S = 10.0
"""Longest wait in a shard for demand; then the client asks again."""

WAIT_SLICE_S = 1.0
"""Longest wait in a shard for new rows; a wait that nobody needs any more ends after this time."""

MAX_BYTES_IN_FLIGHT = 16 * 2**20
MAX_INSERTS_IN_FLIGHT = 4

STOP_POLL_S = 0.5
CLOSE_TIMEOUT_S = 60.0

SLACK_BYTES = 4096
"""A batch that holds this many bytes more than its rows need is a slice; alignment and bitmaps need fewer."""

Float32 = npt.NDArray[np.float32]
T = TypeVar("T")


class BufferLostError(RuntimeError):
    """The process of a shard is gone for good."""


class SampleTimeoutError(TimeoutError):
    """Too few rows came in time for a sample; the message says what was missing and which actors inserted last."""


@dataclass(frozen=True)
class Shard:
    """One shard: handle of its actor, a `ReplayBufferService`, and the node it was placed on. Its methods call
    those of the service; they also raise what `RemoteCall.answer` raises."""

    index: int
    handle: ActorHandle
    node_id: str = ""

    @property
    def name(self) -> str:
        """For messages."""
        return f"shard {self.index} of the replay buffer"

    async def offer(self, request: SampleRequest) -> Offer:
        """See `ReplayBufferService.offer`."""
        return await RemoteCall[Offer](self.name, self.handle.offer.remote(request)).answer(ANSWER_TIMEOUT_S)

    async def sample(self, request: SampleRequest, part: int) -> SampleResult | None:
        """See `ReplayBufferService.sample`."""
        reference = self.handle.sample.remote(request, part)
        return await RemoteCall[SampleResult | None](self.name, reference).answer(ANSWER_TIMEOUT_S)

    async def wait_for_rows(self, inserts: int, timeout_s: float) -> bool:
        """See `ReplayBufferService.wait_for_rows`."""
        reference = self.handle.wait_for_rows.remote(inserts, timeout_s)
        return await RemoteCall[bool](self.name, reference).answer(timeout_s + ANSWER_TIMEOUT_S)


def nearest(shards: Sequence[Shard], node_id: str) -> list[Shard]:
    """The shards on a node; all of them where it has none."""
    return [shard for shard in shards if shard.node_id == node_id] or list(shards)


@dataclass(frozen=True)
class _Insert:
    shard: Shard
    call: RemoteCall[InsertReply]
    size_bytes: int


class BufferClient:
    """Calls to the shards of one buffer. Not thread-safe.

    `insert` and `sample` raise BufferLostError where a shard is gone for good, and NoAnswerError where one does not
    answer within `ANSWER_TIMEOUT_S` after its allowed wait.
    """

    def __init__(self, shards: Sequence[Shard], first: int = 0, max_bytes_in_flight: int = MAX_BYTES_IN_FLIGHT) -> None:
        """shards: all shards where the client samples; where it inserts, those to write to. first: index of the shard
        that gets the first insert (modulo their number). max_bytes_in_flight: limit of unanswered bytes; a larger
        batch is sent alone."""
        self.shards = tuple(shards)
        self.accepted = 0
        self.rejected = 0
        self._turn = first
        self._max_bytes_in_flight = max_bytes_in_flight
        self._inserts: list[_Insert] = []
        self._demands: dict[int, RemoteCall[bool]] = {}  # of shards that asked for a pause
        self._pending_updates: list[RemoteCall[None]] = []  # the next sample waits for them

    # For actors

    @property
    def bytes_in_flight(self) -> int:
        """Bytes of unanswered inserts."""
        return sum(insert.size_bytes for insert in self._inserts)

    def insert(self, batch: pa.RecordBatch) -> None:
        """Send a batch; waits while too many inserts or bytes are unanswered. ValueError where a shard refused a whole
        batch, OSError where its disk refused."""
        batch = compact(batch)
        self._heed_answers()
        free_bytes = self._max_bytes_in_flight - batch.nbytes
        while self._inserts and (self.bytes_in_flight > free_bytes or len(self._inserts) >= MAX_INSERTS_IN_FLIGHT):
            self._finish(self._inserts[0])
        in_turn = [self.shards[(self._turn + offset) % len(self.shards)] for offset in range(len(self.shards))]
        # A finished rollout is sent even if every shard has asked for a pause.
        shard = next((shard for shard in in_turn if shard.index not in self._demands), in_turn[0])
        self._turn += 1
        task = f"take a batch of {batch.nbytes:,} bytes"
        call = RemoteCall[InsertReply](shard.name, shard.handle.insert.remote(batch), task)
        self._inserts.append(_Insert(shard, call, batch.nbytes))

    def throttled(self) -> bool:
        """Whether every shard of the client has asked it to pause. Reads answers; never waits. Raises as `insert`."""
        self._heed_answers()
        for shard in self.shards:
            call = self._demands.get(shard.index)
            if call is not None and call.done():
                del self._demands[shard.index]
                if not _result(call):
                    self._ask_for_demand(shard)
        return len(self._demands) == len(self.shards)

    def settle(self) -> None:
        """Wait until every insert is answered. Raises as `insert`."""
        while self._inserts:
            self._finish(self._inserts[0])

    def _heed_answers(self) -> None:
        ended = ended_calls([insert.call for insert in self._inserts])
        for insert in [insert for insert in self._inserts if insert.call in ended]:
            self._finish(insert)

    def _finish(self, insert: _Insert) -> None:
        reply = _result(insert.call)
        self._inserts.remove(insert)
        self.accepted += reply.accepted
        self.rejected += len(reply.rejections)
        if reply.pause and insert.shard.index not in self._demands:
            self._ask_for_demand(insert.shard)

    def _ask_for_demand(self, shard: Shard) -> None:
        self._demands[shard.index] = RemoteCall(shard.name, shard.handle.wait_for_demand.remote(DEMAND_POLL_S))

    # For the learner

    def sample(
        self, request: SampleRequest, timeout_s: float, while_waiting: Callable[[], None] = lambda: None
    ) -> tuple[SampleResult | None, ...]:
        """What each shard gives to the sample, None where it gives nothing; waits up to `timeout_s` for enough rows.
        while_waiting: called every `STOP_POLL_S`; an error that it raises ends the wait. Raises as
        `sample_from_shards`, and OSError where the disk refused."""
        with _losses():
            return asyncio.run(self._sample(request, timeout_s, while_waiting))

    def update_priorities(self, sampled: Sequence[SampleResult | None], priorities: Float32) -> None:
        """Send the shards new priorities for the rows that `sample` gave; the next sample waits until they are set.
        priorities: [n] in the order of the rows."""
        first = 0
        for shard, part in zip(self.shards, sampled, strict=True):
            if part is not None:
                own = priorities[first : first + len(part.rows)]
                self._pending_updates.append(
                    RemoteCall(shard.name, shard.handle.update_priorities.remote(part.rows, own))
                )
                first += len(part.rows)
        assert first == len(priorities), "one priority for each trajectory of the sample"

    def checkpointed(self, stage: str, step: int) -> None:
        """Tell the shards that no sample of `stage` before `step` will be repeated; the next sample waits for that."""
        for shard in self.shards:
            self._pending_updates.append(RemoteCall(shard.name, shard.handle.checkpointed.remote(stage, step)))

    async def _sample(
        self, request: SampleRequest, timeout_s: float, while_waiting: Callable[[], None]
    ) -> tuple[SampleResult | None, ...]:
        sampling = asyncio.ensure_future(self._sample_when_told(request, timeout_s))
        try:
            while not (await asyncio.wait([sampling], timeout=STOP_POLL_S))[0]:
                while_waiting()
            return sampling.result()
        finally:
            sampling.cancel()

    async def _sample_when_told(self, request: SampleRequest, timeout_s: float) -> tuple[SampleResult | None, ...]:
        while self._pending_updates:  # a shard may execute calls in another order than they were sent
            await self._pending_updates.pop().answer(ANSWER_TIMEOUT_S)
        return await sample_from_shards(self.shards, request, timeout_s)

    # For the driver

    def newest_version(self, timeout_s: float, while_waiting: Callable[[], None]) -> int:
        """Newest policy version that a shard knows, -1 before any; waits until all shards are open. while_waiting,
        errors: as in `RemoteCall.result`."""
        calls = [RemoteCall[int](each.name, each.handle.newest_version.remote(), "open") for each in self.shards]
        return max(call.result(timeout_s, while_waiting) for call in calls)

    def status(self, timeout_s: float) -> BufferStatus:
        """The status of every shard, None where it does not answer. ProcessLostError where one is gone for good."""
        deadline = time.monotonic() + timeout_s
        calls = [RemoteCall[ShardStatus](shard.name, shard.handle.status.remote()) for shard in self.shards]
        return BufferStatus(tuple(_status(call, deadline) for call in calls))

    def close(self) -> list[str]:
        """Close every shard, which makes its rows durable, and end its process; gives a line for each killed one."""
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        calls = [(shard, RemoteCall[None](shard.name, shard.handle.close.remote(), "close")) for shard in self.shards]
        lines = [end_actor(shard.handle, call, deadline - time.monotonic()) for shard, call in calls]
        return [line for line in lines if line is not None]


def compact(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same rows without other bytes: the batch itself, or a copy where it is a slice of a larger batch."""
    if batch.get_total_buffer_size() <= batch.nbytes + batch.nbytes // 8 + SLACK_BYTES:
        return batch
    # The IPC format writes the rows of a slice only.
    compacted: pa.RecordBatch = pa.ipc.read_record_batch(pa.ipc.read_message(batch.serialize()), batch.schema)
    return compacted


def _result(call: RemoteCall[T]) -> T:
    with _losses():
        return call.result(ANSWER_TIMEOUT_S)


def _status(call: RemoteCall[ShardStatus], deadline: float) -> ShardStatus | None:
    try:
        return call.result(max(deadline - time.monotonic(), 0.0))
    except NoAnswerError:
        return None


@contextmanager
def _losses() -> Iterator[None]:
    try:
        yield
    except ProcessLostError as error:
        raise BufferLostError(f"{error}; the rows that it accepted are on disk: resume the run") from None


async def sample_from_shards(
    shards: Sequence[Shard | ReplayBufferService], request: SampleRequest, timeout_s: float
) -> tuple[SampleResult | None, ...]:
    """What each shard gives to one sample, None where it gives nothing. The same request gets the same rows again.

    The client asks in two rounds. `offer` says how many rows a shard has logged for this sample and how many it could
    add; it logs nothing. `sample` logs the shard's rows under the key of the sample, then answers with them. So a lost
    answer can be asked for again. An interruption may leave a sample with the rows of some shards only. The next call
    completes it: logged rows stay, and the missing number is divided among the shards anew. The same happens where rows
    became stale between the two rounds. So a shard without rows never blocks a sample that the others can serve.

    Raises:
        SampleTimeoutError: too few rows came in time; the message says what each shard lacks.
        ValueError: the sample can never be served, or had another size before.
    """
    if len(shards) == 1 and (sampled := await shards[0].sample(request, request.count)) is not None:
        return (sampled,)  # in one call, where nothing is to be divided
    deadline = time.monotonic() + timeout_s
    while True:
        offers = await asyncio.gather(*(shard.offer(request) for shard in shards))
        parts = plan_parts(request.count, offers)
        if parts is not None:
            taken = await asyncio.gather(*map(_sample_part, shards, [request] * len(shards), parts))
            if sum(0 if sampled is None else sampled.batch.num_rows for sampled in taken) == request.count:
                return tuple(taken)
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            lacks = "; ".join(f"shard {index}: {offer.shortage}" for index, offer in enumerate(offers))
            where = f" from {len(offers)} shards: {lacks}" if len(offers) > 1 else f": {offers[0].shortage}"
            raise SampleTimeoutError(
                f"waited {timeout_s:g} s for {request.count} {request.key.source} trajectories{where}"
            )
        if parts is None:
            await _wait_for_news(shards, offers, min(left_s, WAIT_SLICE_S))


async def _sample_part(shard: Shard | ReplayBufferService, request: SampleRequest, part: int) -> SampleResult | None:
    return await shard.sample(request, part) if part else None


async def _wait_for_news(
    shards: Sequence[Shard | ReplayBufferService], offers: Sequence[Offer], timeout_s: float
) -> None:
    """Wait until one shard has stored rows since its offer."""
    waits = [
        asyncio.ensure_future(shard.wait_for_rows(offer.inserts, timeout_s))
        for shard, offer in zip(shards, offers, strict=True)
    ]
    try:
        for wait in (await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED))[0]:
            wait.result()
    finally:
        for wait in waits:
            wait.cancel()
