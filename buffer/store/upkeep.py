"""What keeps the files of a shard in shape: sealing, deleting, compacting, archiving, a new file for the log."""

from __future__ import annotations

import logging
import time

import numpy as np

from buffer.store.archive import Archive
from buffer.store.compaction import Rewrite, RewritePlan
from buffer.store.events import Event
from buffer.store.log_state import LogSnapshot, SourceSnapshot
from buffer.store.opening import ShardState
from buffer.store.row_numbers import Int64
from buffer.store.sealing import Sealer

logger = logging.getLogger(__name__)

FIRST_RETRY_S = 1.0
LONGEST_RETRY_S = 60.0
"""Pauses after a rewriting that failed, each twice as long as the one before."""


class Upkeep:
    """`tidy` belongs to every operation of the store and is quick; `plan` and `finish` enclose what may take long."""

    def __init__(self, shard: ShardState, archive: Archive | None) -> None:
        """archive: of the rows that leave the disk, None = they are deleted."""
        self._shard = shard
        self._archive = archive
        self._retry_s = FIRST_RETRY_S
        self._sealer = Sealer()
        self._next_try_s = 0.0  # on the monotonic clock
        self.error: str | None = None
        """Why the last rewriting failed; None where it did not."""

    @property
    def num_unarchived(self) -> int:
        """Files that nobody needs and that wait for the archive."""
        return 0 if self._archive is None else len(self._shard.files.unneeded(self._shard.log.pinned_rows))

    def tidy(self) -> None:
        """Have a full segment sealed in a thread, delete files that nobody needs, begin a new file of a full log.

        Raises:
            OSError: the disk refused; it is tried again the next time.
        """
        shard = self._shard
        may_delete = self._archive is None and shard.files.has_dead
        if may_delete and (unneeded := shard.files.unneeded(shard.log.pinned_rows)):
            shard.log.sync()  # a loss of power must not leave rows gone without a reason
            shard.files.delete(unneeded)
        if shard.log.is_full:
            self.rotate()
        self._seal()

    def rotate(self) -> None:
        """Begin a new file of the log with the state of now.

        Raises:
            OSError: the disk refused; the log goes on in the file it had.
        """
        shard = self._shard
        sources = {
            source: SourceSnapshot(lane.snapshot(), shard.tallies[source]) for source, lane in shard.lanes.items()
        }
        shard.log.rotate(
            LogSnapshot(
                sources=sources,
                next_row=shard.next_row,
                newest_version=shard.newest_version,
                first_version=shard.first_version,
                rejected=shard.rejected,
                lost=shard.lost,
            )
        )

    def plan(self) -> RewritePlan | None:
        """A rewriting that is worth it; None where none is, one is under way, or the last one failed just now."""
        if time.monotonic() < self._next_try_s:
            return None
        return self._shard.files.plan_rewrite(self._live_rows, self._shard.log.pinned_rows, self._archive)

    def finish(self, rewrite: Rewrite) -> None:
        """The rewriting counts from now on.

        Raises:
            OSError: the disk refused.
        """
        self._shard.log.sync()
        self._shard.files.finish_rewrite(rewrite)
        self._retry_s = FIRST_RETRY_S
        self.error = None

    def fail(self, error: OSError) -> None:
        """The rewriting failed: it is tried again later, and until then what it would have deleted stays."""
        self._shard.files.abandon_rewrite()
        self.error = str(error)
        self._next_try_s = time.monotonic() + self._retry_s
        logger.warning("%s; nothing was deleted, and it is tried again in %.0f s", error, self._retry_s)
        self._retry_s = min(2 * self._retry_s, LONGEST_RETRY_S)

    def _live_rows(self, first: int, end: int) -> Int64:
        live = np.sort(np.concatenate([lane.rows for lane in self._shard.lanes.values()]))
        return live[np.searchsorted(live, first) : np.searchsorted(live, end)]

    def finish_seal(self) -> None:
        """Wait until the first full segment is sealed, and let it count as such.

        Raises:
            OSError: the disk refused; the segment stays open, and `tidy` tries again.
        """
        shard, seal = self._shard, self._sealer.result()
        num_live = sum(int(np.count_nonzero(shard.lanes[source].is_live(rows))) for source, rows in seal.rows.items())
        shard.log.append(*(Event("seal", source=source, rows=rows) for source, rows in seal.rows.items()))
        shard.files.finish_seal(seal, num_live)

    def close(self) -> None:
        """End what runs in threads: it writes into the folder, which another process may take over."""
        if self._sealer.is_busy:
            try:
                self.finish_seal()
            except OSError as error:
                logger.warning("%s; the segment stays open until the folder is used again", error)
        self._sealer.close()

    def _seal(self) -> None:
        files = self._shard.files
        if self._sealer.is_done:
            self.finish_seal()
        if files.is_full:
            if files.has_full:  # inserts are ahead of the disk
                self._start_seal()
                self.finish_seal()
            files.begin_segment()
        if files.has_full:
            self._start_seal()

    def _start_seal(self) -> None:
        if not self._sealer.is_busy:
            self._sealer.start(self._shard.files.plan_seal())
