"""What keeps the files of a shard in shape: sealing, deleting, compacting, archiving, a new file for the log."""

from __future__ import annotations

import logging
import time

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from buffer.schema import SOURCES
from buffer.store.archive import Archive
from buffer.store.compaction import Rewrite, RewritePlan
from buffer.store.events import Event
from buffer.store.log_state import LogSnapshot, SourceSnapshot
from buffer.store.opening import ShardState
from buffer.store.row_numbers import Int64

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
        self._next_try_s = 0.0  # on the monotonic clock
        self.error: str | None = None
        """Why the last rewriting failed; None where it did not."""

    @property
    def num_unarchived(self) -> int:
        """Files that nobody needs and that wait for the archive."""
        return 0 if self._archive is None else len(self._shard.files.unneeded(self._shard.log.pinned_rows))

    def tidy(self) -> None:
        """Seal a full segment, delete files that nobody needs, begin a new file of a full log.

        Raises:
            OSError: the disk refused; it is tried again the next time.
        """
        shard = self._shard
        if shard.files.is_full:
            self._seal()
        may_delete = self._archive is None and shard.files.has_dead
        if may_delete and (unneeded := shard.files.unneeded(shard.log.pinned_rows)):
            shard.log.sync()  # a loss of power must not leave rows gone without a reason
            shard.files.delete(unneeded)
        if shard.log.is_full:
            self.rotate()

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

    def _seal(self) -> None:
        shard = self._shard
        seal = shard.files.begin_seal()
        stored = pa.Table.from_batches(seal.batches).select(["source", "row"]).combine_chunks()
        events, num_live = [], 0
        for source in SOURCES:
            rows = stored.filter(pc.equal(stored.column("source"), source)).column("row").to_numpy()
            if len(rows):
                events.append(Event("seal", source=source, rows=rows))
                num_live += int(np.count_nonzero(shard.lanes[source].is_live(rows)))
        shard.log.append(*events)
        shard.files.finish_seal(seal, num_live)
