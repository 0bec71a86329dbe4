"""What keeps the files of a shard in shape: deleting, compacting, archiving."""

from __future__ import annotations

import logging
import time

from buffer.store.archive import Archive
from buffer.store.compaction import Rewrite, RewritePlan
from buffer.store.recovery import ShardState
from buffer.store.removals import Removals

logger = logging.getLogger(__name__)

FIRST_RETRY_S = 1.0
LONGEST_RETRY_S = 60.0
"""Pauses after a rewriting that failed, each twice as long as the one before."""


class Upkeep:
    """`delete_unneeded` belongs to every operation of the store and is quick; `plan` and `finish` enclose what may take
    long."""

    def __init__(self, shard: ShardState, removals: Removals, archive: Archive | None) -> None:
        """archive: of the rows that leave the disk, None = they are deleted."""
        self._shard = shard
        self._removals = removals
        self._archive = archive
        self._is_rewriting = False
        self._retry_s = FIRST_RETRY_S
        self._next_try_s = 0.0  # on the monotonic clock
        self.error: str | None = None
        """Why the last rewriting failed; None where it did not."""

    @property
    def num_unarchived(self) -> int:
        """Files that nobody needs and that wait for the archive."""
        return 0 if self._archive is None else len(self._unneeded())

    def delete_unneeded(self) -> None:
        """Delete files of which no row is needed, unless they are to be archived.

        Raises:
            OSError: the disk refused; it is tried again the next time.
        """
        if self._archive is None and not self._is_rewriting and (numbers := self._unneeded()):
            self._apply(self._shard.files.plan(numbers, self._shard.draws.pinned_rows, None).run())

    def plan(self) -> RewritePlan | None:
        """Evict what is too old, then find a rewriting that is worth it; None where none is, one is under way, or the
        last one failed just now. `RewritePlan.run` may go on in any thread while the store works; `finish` comes next,
        or `fail` with the error.

        Raises:
            OSError: the disk refused.
        """
        self._removals.evict()
        self.delete_unneeded()
        if self._is_rewriting or time.monotonic() < self._next_try_s:
            return None
        plan = self._shard.files.plan_rewrite(self._shard.draws, self._archive)
        self._is_rewriting = plan is not None
        return plan

    def finish(self, rewrite: Rewrite) -> None:
        """The rewriting counts from now on.

        Raises:
            OSError: the disk refused; `fail` comes next.
        """
        self._apply(rewrite)
        self._is_rewriting = False
        self._retry_s = FIRST_RETRY_S
        self.error = None

    def fail(self, error: OSError) -> None:
        """The rewriting failed: it is tried again later, and until then what it would have deleted stays."""
        self._is_rewriting = False
        self.error = str(error)
        self._next_try_s = time.monotonic() + self._retry_s
        logger.warning("%s; nothing was deleted, and it is tried again in %.0f s", error, self._retry_s)
        self._retry_s = min(2 * self._retry_s, LONGEST_RETRY_S)

    def _unneeded(self) -> list[int]:
        return self._shard.files.unneeded(self._shard.draws)

    def _apply(self, rewrite: Rewrite) -> None:
        self._shard.known.delete(self._shard.files.finish(rewrite))
