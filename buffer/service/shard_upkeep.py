"""What a shard does beside inserts and draws: syncs on a timer, eviction by age, rewriting and archiving of segments.

The store plans and commits on the event loop, in moments; what reads and writes files runs in a thread meanwhile.
"""

from __future__ import annotations

import asyncio
import logging

from buffer.settings import BufferSettings
from buffer.store.replay_store import ReplayStore

DEFAULT_SYNC_INTERVAL_S = 1.0
UPKEEP_INTERVAL_S = 2.0
STOP_TIMEOUT_S = 60.0

logger = logging.getLogger(__name__)


class ShardUpkeep:
    """The upkeep of one store; its methods are called on the event loop that the store is used on."""

    def __init__(self, store: ReplayStore, settings: BufferSettings, interval_s: float = UPKEEP_INTERVAL_S) -> None:
        """interval_s: between two looks at what is to be done."""
        self._store = store
        self._interval_s = interval_s
        self._sync_interval_s: float | None = None
        if settings.fsync == "interval":
            self._sync_interval_s = settings.fsync_interval_s or DEFAULT_SYNC_INTERVAL_S
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def ensure(self) -> None:
        """Begin, where it has not begun: nobody else starts it in a process that was restarted.

        Raises:
            OSError: a sync on the timer failed, so what was acknowledged may not be durable; no call is served then.
        """
        if not self._tasks and not self._stopping.is_set():
            self._tasks.append(asyncio.create_task(self._keep_tidy()))
            if self._sync_interval_s is not None:
                self._tasks.append(asyncio.create_task(self._keep_synced(self._sync_interval_s)))
        for task in self._tasks:
            if task.done():
                task.result()

    async def stop(self) -> None:
        """End it; a rewriting under way is finished first, since another process may take the folder over."""
        self._stopping.set()
        if not self._tasks:
            return
        _, late = await asyncio.wait(self._tasks, timeout=STOP_TIMEOUT_S)
        if late:
            logger.warning("the upkeep of the replay buffer did not end within %.0f s", STOP_TIMEOUT_S)

    async def _keep_synced(self, interval_s: float) -> None:
        while not await self._stopped_within(interval_s):
            await asyncio.to_thread(self._store.prepare_sync())

    async def _keep_tidy(self) -> None:
        while not await self._stopped_within(self._interval_s):
            try:
                plan = self._store.plan_upkeep()
                if plan is None:
                    continue
                try:
                    self._store.finish_upkeep(await asyncio.to_thread(plan.run))
                except OSError as error:
                    self._store.fail_upkeep(error)
            except OSError as error:  # the disk is full, say: inserts will tell, and it is tried again
                logger.warning("the upkeep of the replay buffer failed: %s", error)

    async def _stopped_within(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._stopping.wait()
        except TimeoutError:
            return False
        return True
