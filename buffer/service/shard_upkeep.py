"""What a shard does beside inserts and draws: syncs on a timer, eviction by age, rewriting and archiving of segments.

The store plans and commits on the event loop, in moments; what reads and writes files runs in a thread meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from buffer.settings import BufferSettings
from buffer.store.store import ReplayStore

DEFAULT_SYNC_INTERVAL_S = 1.0
UPKEEP_INTERVAL_S = 2.0
STOP_TIMEOUT_S = 60.0

logger = logging.getLogger(__name__)


class ShardUpkeep:
    """The upkeep of one store; its methods are called on the event loop that the store is used on."""

    def __init__(self, store: ReplayStore, settings: BufferSettings, interval_s: float = UPKEEP_INTERVAL_S) -> None:
        """interval_s: between two looks at what is to be done."""
        self._store = store
        self._loops = [(interval_s, self._tidy)]
        if settings.fsync == "interval":
            self._loops.append((settings.fsync_interval_s or DEFAULT_SYNC_INTERVAL_S, self._sync))
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def ensure(self) -> None:
        """Begin, where it has not begun: nobody else starts it in a process that was restarted.

        Raises:
            OSError: a sync on the timer failed, so what was acknowledged may not be durable; no call is served then.
        """
        if not self._tasks and not self._stopping.is_set():
            self._tasks = [asyncio.create_task(self._repeat(*loop)) for loop in self._loops]
        for task in self._tasks:
            if task.done():
                task.result()

    async def stop(self) -> None:
        """End it; a rewriting under way is finished first, since another process may take the folder over."""
        self._stopping.set()
        if self._tasks and (await asyncio.wait(self._tasks, timeout=STOP_TIMEOUT_S))[1]:
            logger.warning("the upkeep of the replay buffer did not end within %.0f s", STOP_TIMEOUT_S)

    async def _repeat(self, interval_s: float, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), interval_s)
                return
            await work()

    async def _sync(self) -> None:
        await asyncio.to_thread(self._store.prepare_sync())

    async def _tidy(self) -> None:
        try:
            plan = self._store.upkeep.plan()
            if plan is None:
                return
            try:
                self._store.upkeep.finish(await asyncio.to_thread(plan.run))
            except OSError as error:
                self._store.upkeep.fail(error)
        except OSError as error:  # the disk is full, say: inserts will raise it, and this is tried again
            logger.warning("the upkeep of the replay buffer failed: %s", error)
