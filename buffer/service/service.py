"""One shard of the replay buffer as a process: actors insert into its store, and the learner samples from it.

The launcher makes it a Ray actor (`ray.remote(ReplayBufferService)`). All methods that wait are coroutines on one event
loop, so the store needs no lock. Actors and learner wait for each other (see `buffer.store.limiter`):

    actors pause   while the samples are too far behind the inserts, and no sample is waiting
    samples wait   while they would run ahead of the inserts, or too few rows are live

A waiting sample always ends the pause, so the two never wait at the same time. If the process is killed, Ray starts
another one, and every call can be repeated there: the ids of trajectories and the keys of samples say what was done
already. `ShardMaintenance` does slow work (syncs on a timer, rewriting segments) in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from buffer.processes import ignore_stop_signals
from buffer.service.shard import InsertReply, Offer, SampleRequest, ShardStatus
from buffer.settings import BufferSettings
from buffer.store.limiter import Limiter
from buffer.store.shard import SampleResult
from buffer.store.store import ReplayStore
from buffer.trajectory.schema import TokenContract

if TYPE_CHECKING:
    from buffer.service.flight import FlightEndpoint

DEFAULT_SYNC_INTERVAL_S = 1.0
MAINTENANCE_INTERVAL_S = 2.0
STOP_TIMEOUT_S = 60.0

logger = logging.getLogger(__name__)

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


class ReplayBufferService:
    """A replay store whose callers can wait: a sample for rows, an actor for demand."""

    def __init__(
        self,
        folder: str,
        contract: TokenContract,
        settings: BufferSettings,
        seed: int,
        flight_token: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the store in `folder`. settings: of this shard. seed: of its samples. flight_token: readers
        present it to the Arrow Flight endpoint, if the settings enable that. clock: seconds since the epoch.

        Raises:
            ValueError: see `ReplayStore`, or this node does not see the run folder.
        """
        ignore_stop_signals()
        if not Path(folder).parent.is_dir():
            raise ValueError(
                f"{Path(folder).parent} does not exist on this node ({socket.gethostname()}): the run folder must be "
                "on storage that every node with a shard sees; set runs_folder, or buffer.shards=1"
            )
        self._settings = settings
        self._started_s = time.monotonic()
        self._store = ReplayStore(Path(folder), contract, settings, seed, clock)
        self._maintenance = ShardMaintenance(self._store, settings)
        self._limiter = Limiter(settings)
        self._changed = asyncio.Condition()
        self._inserts = 0
        self._waiting_samples = 0
        self._last_insert_s: dict[str, float] = {}
        self._last_rejection = ""
        self._flight: FlightEndpoint | None = None
        if settings.flight.enabled:
            from buffer.service.flight import FlightEndpoint

            assert flight_token is not None, "the launcher makes a token"
            host, port = settings.flight.host, settings.flight.port
            self._flight = FlightEndpoint(Path(folder), contract, host, port, flight_token, self._store.catalog_image)

    async def insert(self, batch: pa.RecordBatch) -> InsertReply:
        """Store a batch; on return the accepted rows are in the segment file. ValueError where it does not fit as a
        whole, OSError where the disk refuses, here and below."""
        self._maintenance.ensure()
        result = self._store.insert(batch)
        if result.rejections:
            self._last_rejection = result.rejections[-1].reason
        if result.accepted:
            now_s = asyncio.get_running_loop().time()
            for actor in pc.unique(batch.column("actor")).to_pylist():
                self._last_insert_s[actor] = now_s
            self._inserts += 1
            await self._notify()
        return InsertReply(result.accepted + result.present, result.rejections, pause=not self._demand())

    async def offer(self, request: SampleRequest) -> Offer:
        """How many rows this shard can give to a sample; other shards may give more. Drops rows that are too stale.
        ValueError where the sample can never be served, or had another size before."""
        self._maintenance.ensure()
        key, store = request.key, self._store
        capacity = self._settings.capacity * self._settings.shards
        if request.count > capacity:
            raise ValueError(
                f"a sample of {request.count} trajectories can never be served: the buffer holds {capacity} per "
                "source; lower the batch or raise buffer.capacity"
            )
        store.begin_stage(request.first_version)
        available = store.num_available(key, request.count, request.policy_version)
        live, logged = store.num_live(key.source), store.num_logged(key)
        if store.counters(key.source).sampled == 0 and live < self._settings.min_size:
            available = 0
        if key.source == "policy":
            available = min(available, self._limiter.allowance(self._store.counters("policy")))
        shortage = "" if logged + available >= request.count else self._shortage(request)
        return Offer(logged, live, available, self._inserts, shortage)

    async def sample(self, request: SampleRequest, part: int) -> SampleResult | None:
        """`part` rows for a sample: those that the shard has logged for it, and new ones. None where it can no longer
        give so many. ValueError where the sample had another size before."""
        self._maintenance.ensure()
        key, store = request.key, self._store
        store.begin_stage(request.first_version)
        added = part - store.num_logged(key)
        if key.source == "policy" and added > self._limiter.allowance(self._store.counters("policy")):
            return None
        result = store.sample(key, part, request.policy_version, whole=request.count)
        if result is not None:
            await self._notify()
        return result

    async def wait_for_rows(self, inserts: int, timeout_s: float) -> bool:
        """Wait until the shard has stored more than `inserts` inserts (see `offer`); False if `timeout_s` passed first.
        A sample waits meanwhile, so the shard asks no actor to pause."""
        self._waiting_samples += 1
        try:
            await self._notify()
            return await self._wait(lambda: self._inserts != inserts, timeout_s)
        finally:
            self._waiting_samples -= 1

    async def wait_for_demand(self, timeout_s: float) -> bool:
        """Wait until paused actors may continue; False if `timeout_s` passed first (ask again)."""
        return await self._wait(self._demand, timeout_s)

    async def update_priorities(self, rows: Int64, priorities: Float32) -> None:
        """Set the priorities of policy rows of the shard; see `ReplayStore.update_priorities`."""
        self._store.update_priorities(rows, priorities)

    async def checkpointed(self, stage: str, step: int) -> None:
        """The learner has a durable checkpoint of `stage` after `step` steps: it will repeat no sample before it."""
        self._store.checkpointed(stage, step)

    async def newest_version(self) -> int:
        """Newest policy version the shard knows of, also from before a restart; -1 before any."""
        return self._store.newest_version

    async def catalog_image(self) -> bytes:
        """The shard's catalog of now, for readers on other hosts; see `ReplayStore.catalog_image`."""
        return self._store.catalog_image()

    async def status(self) -> ShardStatus:
        """The current state."""
        self._maintenance.ensure()
        return ShardStatus(
            store=self._store.status(),
            capacity=self._settings.capacity,
            actors_paused=not self._demand(),
            waiting_samples=self._waiting_samples,
            pid=os.getpid(),
            host=socket.gethostname(),
            up_s=time.monotonic() - self._started_s,
            flight=None if self._flight is None else self._flight.location,
        )

    async def close(self) -> None:
        """Make everything durable and release the folder."""
        if self._flight is not None:
            await asyncio.to_thread(self._flight.close)
        await self._maintenance.stop()
        self._store.close()

    def _shortage(self, request: SampleRequest) -> str:
        """Why the shard cannot serve a sample, as text for users."""
        count, source = request.count, request.key.source
        status = self._store.status()
        counters = status.sources[source]
        needed = count if counters.sample_calls else max(count, self._settings.min_size)
        if counters.live < needed:
            message = f"{counters.live} are live and {needed} are needed; "
        else:
            more = self._limiter.inserts_needed(count, self._store.counters("policy"))
            message = (
                f"{counters.sampled} were sampled of {counters.inserted} inserted, and samples_per_insert="
                f"{self._settings.samples_per_insert} asks for {more} more inserts first; "
            )
        if counters.dropped_stale:
            message += f"{counters.dropped_stale} were dropped as stale; "
        if self._last_rejection:
            message += f"{status.rejected} were rejected, the last because: {self._last_rejection}; "
        if not self._last_insert_s:
            return message + "no actor has inserted anything since the buffer started"
        now_s = asyncio.get_running_loop().time()
        last = [f"{actor} {now_s - when_s:.0f} s ago" for actor, when_s in sorted(self._last_insert_s.items())]
        return message + f"last inserts: {', '.join(last)}"

    def _demand(self) -> bool:
        return self._waiting_samples > 0 or self._limiter.wants_inserts(self._store.counters("policy"))

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _wait(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(condition)
        except TimeoutError:
            return False
        return True


class ShardMaintenance:
    """The background work of a shard: syncs on a timer, eviction by age, rewriting of segments. The store plans and
    commits on the event loop; a thread reads and writes the files."""

    def __init__(
        self, store: ReplayStore, settings: BufferSettings, interval_s: float = MAINTENANCE_INTERVAL_S
    ) -> None:
        """interval_s: time between two checks for work."""
        self._store = store
        self._loops: list[tuple[float, Callable[[], Awaitable[None]]]] = [(interval_s, self._maintain)]
        if settings.fsync == "interval":
            interval_s = settings.fsync_interval_s or DEFAULT_SYNC_INTERVAL_S
            self._loops.append((interval_s, lambda: asyncio.to_thread(store.prepare_sync())))
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def ensure(self) -> None:
        """Start the background tasks if they do not run yet, as after a restart of the process. OSError where a sync on
        the timer failed: acknowledged rows may not be durable, so every later call fails."""
        if not self._tasks and not self._stopping.is_set():
            self._tasks = [asyncio.create_task(self._repeat(*loop)) for loop in self._loops]
        for task in self._tasks:
            if task.done():
                task.result()

    async def stop(self) -> None:
        """End the background tasks; a rewrite in progress finishes first, since another process may open the folder."""
        self._stopping.set()
        if self._tasks and (await asyncio.wait(self._tasks, timeout=STOP_TIMEOUT_S))[1]:
            logger.warning("the maintenance of the replay buffer did not end within %.0f s", STOP_TIMEOUT_S)

    async def _repeat(self, interval_s: float, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), interval_s)
                return
            await work()

    async def _maintain(self) -> None:
        try:
            plan = self._store.maintenance.plan()
            if plan is None:
                return
            try:
                self._store.maintenance.finish(await asyncio.to_thread(plan.run))
            except OSError as error:
                self._store.maintenance.fail(error)
        except OSError as error:  # such as a full disk: inserts raise it too, and the work is tried again
            logger.warning("the maintenance of the replay buffer failed: %s", error)
