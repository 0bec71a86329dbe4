"""The replay buffer of a run as the other processes use it: actors insert, the learner draws, the driver asks.

Inserts are sent without waiting, in turn to the shards of the client, and answered while the caller works on. Those
that no shard has answered yet are bounded, in number and in bytes: beyond that the caller waits.

A shard that died is restarted by Ray, which sends the unanswered calls again, each to the shard it was for: a
trajectory that is stored there already counts as accepted, since its id is known. It is never sent to another shard,
which could not know that.

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
"""Beyond the time that a call itself may wait: a shard that died needs some to come back, more with a large folder."""

DEMAND_POLL_S = 10.0
"""Longest wait in a shard for demand; then it is asked again."""

WAIT_SLICE_S = 1.0
"""Longest wait in a shard for news; a wait that nobody needs any more ends by itself after so long."""

MAX_BYTES_IN_FLIGHT = 16 * 2**20
MAX_INSERTS_IN_FLIGHT = 4

STOP_POLL_S = 0.5
CLOSE_TIMEOUT_S = 60.0

SLACK_BYTES = 4096
"""More bytes than its rows need, by which a batch is taken for a slice; alignment and validity bitmaps need some."""

Float32 = npt.NDArray[np.float32]
T = TypeVar("T")


class BufferLostError(RuntimeError):
    """The process of a shard is gone for good."""


class SampleTimeoutError(TimeoutError):
    """The buffer could not serve a draw in time; the message says what it lacked and whom it waited for."""


@dataclass(frozen=True)
class Shard:
    """One shard: handle of its actor, a `ReplayBufferService`, and the node it was placed on. Its methods are those of
    the service, called from another process; they raise as `RemoteCall.answer`, too."""

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

    Inserts and draws raise BufferLostError where a shard is gone for good, and NoAnswerError where one is silent for
    `ANSWER_TIMEOUT_S` longer than it may wait.
    """

    def __init__(self, shards: Sequence[Shard], first: int = 0, max_bytes_in_flight: int = MAX_BYTES_IN_FLIGHT) -> None:
        """shards: all of the buffer for draws; for inserts those to write to. first: which of them takes the first
        insert (modulo their number). max_bytes_in_flight: may be unanswered; a larger batch is sent alone."""
        self.shards = tuple(shards)
        self.accepted = 0
        self.rejected = 0
        self._turn = first
        self._max_bytes_in_flight = max_bytes_in_flight
        self._inserts: list[_Insert] = []
        self._demands: dict[int, RemoteCall[bool]] = {}  # of shards that asked for a pause
        self._told: list[RemoteCall[None]] = []  # that no draw has waited for yet

    # For actors

    @property
    def bytes_in_flight(self) -> int:
        """Bytes of inserts that are not answered yet."""
        return sum(insert.size_bytes for insert in self._inserts)

    def insert(self, batch: pa.RecordBatch) -> None:
        """Send a batch; waits while more than the allowed inserts or bytes would be unanswered. ValueError where a
        shard refuses a batch as a whole, OSError where its disk does."""
        batch = compact(batch)
        self._heed_answers()
        free_bytes = self._max_bytes_in_flight - batch.nbytes
        while self._inserts and (self.bytes_in_flight > free_bytes or len(self._inserts) >= MAX_INSERTS_IN_FLIGHT):
            self._finish(self._inserts[0])
        in_turn = [self.shards[(self._turn + offset) % len(self.shards)] for offset in range(len(self.shards))]
        # What is finished has to go somewhere, also where all have asked for a pause.
        shard = next((shard for shard in in_turn if shard.index not in self._demands), in_turn[0])
        self._turn += 1
        task = f"take a batch of {batch.nbytes:,} bytes"
        call = RemoteCall[InsertReply](shard.name, shard.handle.insert.remote(batch), task)
        self._inserts.append(_Insert(shard, call, batch.nbytes))

    def throttled(self) -> bool:
        """Whether every shard of the client has asked it to pause. Heeds answers; never waits. Raises as `insert`."""
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
        """The part of each shard in a draw, None where it has none; waits up to `timeout_s` for enough rows.
        while_waiting: called every `STOP_POLL_S`; an error that it raises ends the wait. Raises as
        `sample_from_shards`,
        and OSError where the disk refused."""
        with _losses():
            return asyncio.run(self._sample(request, timeout_s, while_waiting))

    def update_priorities(self, drawn: Sequence[SampleResult | None], priorities: Float32) -> None:
        """Tell the shards how likely the rows of a draw, as `draw` gave it, are to be drawn again; the next draw waits
        for it. priorities: [n] in the order of the rows."""
        first = 0
        for shard, part in zip(self.shards, drawn, strict=True):
            if part is not None:
                own = priorities[first : first + len(part.rows)]
                self._told.append(RemoteCall(shard.name, shard.handle.update_priorities.remote(part.rows, own)))
                first += len(part.rows)
        assert first == len(priorities), "one priority for each trajectory of the draw"

    def checkpointed(self, stage: str, step: int) -> None:
        """Tell the shards that no draw of `stage` before `step` will be repeated; the next draw waits for it."""
        for shard in self.shards:
            self._told.append(RemoteCall(shard.name, shard.handle.checkpointed.remote(stage, step)))

    async def _sample(
        self, request: SampleRequest, timeout_s: float, while_waiting: Callable[[], None]
    ) -> tuple[SampleResult | None, ...]:
        drawing = asyncio.ensure_future(self._sample_when_told(request, timeout_s))
        try:
            while not (await asyncio.wait([drawing], timeout=STOP_POLL_S))[0]:
                while_waiting()
            return drawing.result()
        finally:
            drawing.cancel()

    async def _sample_when_told(self, request: SampleRequest, timeout_s: float) -> tuple[SampleResult | None, ...]:
        while self._told:  # a shard may take calls in another order than they were sent in
            await self._told.pop().answer(ANSWER_TIMEOUT_S)
        return await sample_from_shards(self.shards, request, timeout_s)

    # For the driver

    def newest_version(self, timeout_s: float, while_waiting: Callable[[], None]) -> int:
        """Newest policy version that a shard knows of, -1 before any; waits until all shards are open. Raises as
        `RemoteCall.result`, of which `while_waiting` is."""
        calls = [RemoteCall[int](each.name, each.handle.newest_version.remote(), "open") for each in self.shards]
        return max(call.result(timeout_s, while_waiting) for call in calls)

    def status(self, timeout_s: float) -> BufferStatus:
        """The status of every shard, None where it is silent. ProcessLostError where one is gone for good."""
        deadline = time.monotonic() + timeout_s
        calls = [RemoteCall[ShardStatus](shard.name, shard.handle.status.remote()) for shard in self.shards]
        return BufferStatus(tuple(_status(call, deadline) for call in calls))

    def close(self) -> list[str]:
        """Let every shard make its rows durable, then end the processes; gives a line on each that had to be killed."""
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        calls = [(shard, RemoteCall[None](shard.name, shard.handle.close.remote(), "close")) for shard in self.shards]
        lines = [end_actor(shard.handle, call, deadline - time.monotonic()) for shard, call in calls]
        return [line for line in lines if line is not None]


def compact(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same rows, holding no bytes but their own: the batch itself, or a copy where it is a slice of a larger."""
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
        raise BufferLostError(f"{error}; what it accepted is on disk: resume the run") from None


async def sample_from_shards(
    shards: Sequence[Shard | ReplayBufferService], request: SampleRequest, timeout_s: float
) -> tuple[SampleResult | None, ...]:
    """One draw from all shards, the same again when it is repeated: the part of each, None where it has none.

    The shards are asked in two rounds: `offer` says what each has logged for this draw and could add, and changes
    nothing; `sample` logs a part and answers it. A part is logged under the draw's key before it is answered, so a lost
    answer is asked for again. A draw that an interruption left with some of its parts logged is completed: the parts
    that are there stay, the rest is divided anew. A shard whose offer no longer holds (its rows went stale in between)
    leaves the draw in just that state. So no shard that lacks rows holds up a draw that others can serve.

    Raises:
        SampleTimeoutError: too few rows came in time; the message says what each shard lacks.
        ValueError: the draw can never be served, or had another size before.
    """
    if len(shards) == 1 and (drawn := await shards[0].sample(request, request.count)) is not None:
        return (drawn,)  # in one call, where nothing is to be divided
    deadline = time.monotonic() + timeout_s
    while True:
        offers = await asyncio.gather(*(shard.offer(request) for shard in shards))
        parts = plan_parts(request.count, offers)
        if parts is not None:
            taken = await asyncio.gather(*map(_sample_part, shards, [request] * len(shards), parts))
            if sum(0 if drawn is None else drawn.batch.num_rows for drawn in taken) == request.count:
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
    """Until one shard has taken rows since its offer."""
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
