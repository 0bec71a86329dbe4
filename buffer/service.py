"""The replay buffer as a process: a store behind a door where actors hand in and the learner draws.

The launcher makes it a Ray actor (`ray.remote(ReplayBufferService)`). All methods that wait are coroutines on
one event loop, so the store needs no lock. Actors and learner are coupled in both directions:

    actors pause   when inserted - drawn >= max_inserts_ahead and no draw is waiting
    draws wait     while drawn + count > max_samples_per_insert * inserted, or too few rows are live

Both count policy rows since this process started. A waiting draw always lifts the pause, so the two never
wait for each other.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from buffer.consumption_log import DrawKey
from buffer.counters import DrawResult, StoreStatus
from buffer.schema import SOURCES, TokenContract
from buffer.settings import BufferSettings
from buffer.store import ReplayStore
from buffer.validation import Rejection

MAX_RECENT_REJECTIONS = 8


class DrawTimeoutError(TimeoutError):
    """The buffer could not serve a draw in time; the message says what it lacked and whom it waited for."""


@dataclass(frozen=True)
class InsertReply:
    """accepted: rows stored; rejections: the others, with reasons; pause: call `wait_for_demand` before going on."""

    accepted: int
    rejections: tuple[Rejection, ...]
    pause: bool


@dataclass(frozen=True)
class BufferStatus:
    """State of the service. recent_rejections: the last few, newest last; inserts_ahead: policy rows not yet drawn."""

    store: StoreStatus
    inserts_ahead: int
    waiting_draws: int
    recent_rejections: tuple[Rejection, ...]

    def summary(self) -> str:
        """One line for people."""
        parts = []
        for source in SOURCES:
            counters = self.store.sources[source]
            if counters.inserted == 0:
                continue
            line = f"{counters.live:,} {source} trajectories live of {counters.inserted:,}, {counters.drawn:,} drawn"
            if counters.replayed:
                line += f", {counters.replayed:,} drawn again"
            if counters.dropped_stale:
                line += f", {counters.dropped_stale:,} stale"
            if source == "policy" and counters.last_draw is not None:
                line += f", staleness {counters.last_draw.staleness_mean:.1f}"
            parts.append(line)
        if self.store.rejected:
            parts.append(f"{self.store.rejected:,} rejected")
        return "buffer: " + ("; ".join(parts) or "empty")


class ReplayBufferService:
    """A replay store that waits: draws for rows, actors for demand."""

    def __init__(self, folder: str, contract: TokenContract, settings: BufferSettings, seed: int) -> None:
        """Open the store in `folder`. seed: of the draws.

        Raises:
            ValueError: see `ReplayStore`.
        """
        self._settings = settings
        self._store = ReplayStore(Path(folder), contract, settings, seed)
        self._changed = asyncio.Condition()
        self._inserted = 0
        self._drawn = 0
        self._waiting_draws = 0
        self._last_insert_s: dict[str, float] = {}
        self._recent_rejections: tuple[Rejection, ...] = ()

    async def insert(self, batch: pa.RecordBatch) -> InsertReply:
        """Store a batch; on return the accepted rows are durable.

        Raises:
            ValueError: the batch as a whole does not fit. OSError: the disk refused.
        """
        before = self._store.num_inserted("policy")
        result = self._store.insert(batch)
        self._inserted += self._store.num_inserted("policy") - before
        self._recent_rejections = (*self._recent_rejections, *result.rejections)[-MAX_RECENT_REJECTIONS:]
        if result.accepted:
            now_s = time.monotonic()
            for actor in pc.unique(batch.column("actor")).to_pylist():
                self._last_insert_s[actor] = now_s
            await self._notify()
        return InsertReply(result.accepted, result.rejections, pause=not self._demand())

    async def draw(self, key: DrawKey, count: int, policy_version: int, timeout_s: float = 60.0) -> DrawResult:
        """The rows that the draw `key` was given before, at once, else `count` live rows of its source, waiting up to
        `timeout_s` for them.

        policy_version: newest version the caller has published; see `ReplayStore.draw`.

        Raises:
            ValueError: the draw can never be served.
            DrawTimeoutError: too few rows came in time.
        """
        drawn: list[DrawResult] = []

        def served() -> bool:
            if key.source == "policy" and self._limited(count) and not self._store.has_drawn(key):
                return False
            result = self._store.draw(key, count, policy_version)
            if result is not None:
                drawn.append(result)
            return result is not None

        self._waiting_draws += 1
        try:
            if not served():
                await self._notify()  # a waiting draw is demand
                await self._wait(served, timeout_s)
        finally:
            self._waiting_draws -= 1
        if not drawn:
            raise DrawTimeoutError(self._why_not(count, key.source, timeout_s))
        if key.source == "policy" and not drawn[0].repeated:  # those were counted when they were drawn first
            self._drawn += count
        await self._notify()
        return drawn[0]

    async def wait_for_demand(self, timeout_s: float) -> bool:
        """Wait until actors that were told to pause may go on; False if `timeout_s` passed first (ask again)."""
        if self._demand():
            return True
        return await self._wait(self._demand, timeout_s)

    async def begin_stage(self, first_version: int) -> None:
        """A stage of training starts with the weights of `first_version`: older rows are of another stage."""
        self._store.begin_stage(first_version)

    async def checkpointed(self, stage: str, step: int) -> None:
        """The learner has a durable checkpoint of `stage` after `step` steps: it will repeat no draw before it.

        Raises:
            OSError: the disk refused.
        """
        self._store.checkpointed(stage, step)

    async def newest_version(self) -> int:
        """Newest policy version the buffer knows of, also from before a restart; -1 before any."""
        return self._store.newest_version

    async def status(self) -> BufferStatus:
        """Counters of now."""
        return BufferStatus(
            self._store.status(), self._inserted - self._drawn, self._waiting_draws, self._recent_rejections
        )

    async def close(self) -> None:
        """Make everything durable and let go of the folder."""
        self._store.close()

    def _demand(self) -> bool:
        return self._waiting_draws > 0 or self._inserted - self._drawn < self._settings.max_inserts_ahead

    def _limited(self, count: int) -> bool:
        ratio = self._settings.max_samples_per_insert
        return ratio is not None and self._drawn + count > ratio * self._inserted

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

    def _why_not(self, count: int, source: str, timeout_s: float) -> str:
        counters = self._store.status().sources[source]
        message = f"waited {timeout_s:g} s for {count} {source} trajectories: "
        needed = count if counters.last_draw is not None else max(count, self._settings.min_size)
        if counters.live >= needed:
            message += (
                f"{self._drawn} were drawn of {self._inserted} inserted, and max_samples_per_insert="
                f"{self._settings.max_samples_per_insert} asks for more inserts first; "
            )
        else:
            message += f"{counters.live} are live and {needed} are needed; "
        if counters.dropped_stale:
            message += f"{counters.dropped_stale} were dropped as stale; "
        if self._recent_rejections:
            message += f"{self._store.status().rejected} were rejected, the last because: "
            message += f"{self._recent_rejections[-1].reason}; "
        if not self._last_insert_s:
            return message + "no actor has inserted anything since the buffer started"
        now_s = time.monotonic()
        last = [f"{actor} {now_s - when_s:.0f} s ago" for actor, when_s in sorted(self._last_insert_s.items())]
        return message + f"last inserts: {', '.join(last)}"
