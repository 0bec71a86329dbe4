"""The replay store of one shard: durable inserts, capacity, age, strict staleness, draws that can be repeated.

    insert: validate -> segment file (acknowledged) -> live rows -> evict beyond capacity and age
    draw:   known to the log? the same rows again. Else: drop what must not be drawn -> sampler -> log -> gather

Rows of each source are kept apart: capacity counts per source, and a draw names its source. Every row that ceases to be
live is noted in the consumption log with its reason first; the log says after a crash which rows are live (see
`buffer.store.opening`). Rows that are no longer live stay on disk as long as the log pins them, then leave with their
file, or with a rewriting of it (see `buffer.store.compaction`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from buffer.sampling.draw_numbers import DrawNumbers
from buffer.sampling.lane import Lane
from buffer.sampling.live_facts import Drawn
from buffer.sampling.row_facts import RowFacts
from buffer.settings import BufferSettings
from buffer.store.archive import Archive
from buffer.store.compaction import Rewrite, RewritePlan
from buffer.store.consumption_log import DrawKey, LoggedDraw
from buffer.store.counters import DrawResult, InsertResult, LastDraw, SourceCounters, StoreStatus
from buffer.store.door import check
from buffer.store.events import Event
from buffer.store.folder_lock import FolderLock
from buffer.store.known_ids import UInt64
from buffer.store.opening import open_shard
from buffer.store.quarantine import quarantined
from buffer.store.removals import Removals
from buffer.store.row_numbers import Int64
from buffer.store.upkeep import Upkeep
from buffer.trajectory.schema import SOURCES, TokenContract, with_rows
from buffer.trajectory.staleness import VersionRange
from buffer.trajectory.validation import source_codes

Float32 = npt.NDArray[np.float32]


class ReplayStore:
    """The trajectories of one folder. One process at a time, not thread-safe."""

    def __init__(
        self,
        folder: Path,
        contract: TokenContract,
        settings: BufferSettings,
        seed: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open `folder`, creating it where absent, and restore its live rows.

        seed: of the draws. clock: seconds since the epoch.

        Raises:
            ValueError: another process has the folder open, its rows follow another token contract, or the archive's
                URL names no file system.
            CorruptSegmentError: the manifest or the consumption log is damaged.
            OSError: the disk refused.
        """
        self._folder = folder
        self._contract = contract
        self._settings = settings
        self._numbers = DrawNumbers(seed)
        self._clock = clock
        self._replayed = dict.fromkeys(SOURCES, 0)
        self._last_draw: dict[str, LastDraw | None] = dict.fromkeys(SOURCES)
        folder.mkdir(parents=True, exist_ok=True)
        archive = None if settings.archive is None else Archive(settings.archive, folder)
        self._lock = FolderLock(folder)
        try:
            self._shard, has_forgotten = open_shard(folder, contract, settings, clock)
            self._removals = Removals(settings, self._shard, clock)
            self._upkeep = Upkeep(self._shard, archive)
            self._quarantined = quarantined(folder)
            if has_forgotten:
                self._upkeep.rotate()
            self._removals.evict()
            self._upkeep.tidy()
        except BaseException:
            self._lock.release()
            raise

    @property
    def newest_version(self) -> int:
        """Newest policy version seen in a row or at a draw; -1 before any."""
        return self._shard.newest_version

    @property
    def next_row(self) -> int:
        """Rows inserted since the folder exists."""
        return self._shard.next_row

    def num_live(self, source: str) -> int:
        """Live rows of `source`."""
        return len(self._lane(source))

    def num_inserted(self, source: str) -> int:
        """Rows of `source` inserted since the folder exists."""
        return self._shard.tallies[source].inserted

    def num_drawn(self, source: str) -> int:
        """Rows of `source` drawn since the folder exists, each counted every time, repeated draws once."""
        return self._shard.tallies[source].drawn

    def insert(self, batch: pa.RecordBatch) -> InsertResult:
        """Validate and store a batch; on return the accepted rows are in the segment file.

        A row whose id is live already, or was removed lately, is passed over and counted as present, so that an insert
        may be repeated when its answer was lost.

        Raises:
            ValueError: the batch as a whole does not fit (see `buffer.trajectory.validation.validate`).
            OSError: the disk refused. A repeated insert counts the rows that were stored all the same as present.
        """
        checked = check(batch, self._contract, self._shard.known)
        if checked.good.num_rows:
            self._store(checked.good, checked.hashes)
        if checked.rejections:
            self._shard.log.append(*checked.to_events())
            self._shard.rejected += len(checked.rejections)
        self._removals.evict()
        self._upkeep.tidy()
        return InsertResult(checked.good.num_rows, checked.rejections, checked.num_present)

    def draw(self, key: DrawKey, count: int, policy_version: int, whole: int | None = None) -> DrawResult | None:
        """The rows that the draw `key` was given before, else `count` distinct live rows of its source, none staler
        than `max_staleness`. Same seed, key and contents: same rows.

        policy_version: newest published version as far as the caller knows. whole: rows of the draw over all shards,
        of which this one gives `count`; None = all of them. A part that was given before is completed to `count`.
        None while too few rows are live: fewer than `count`, or than `min_size` before the first draw. For a new draw
        rows that must not be drawn are dropped for good first, whatever comes of it.

        Raises:
            ValueError: `count` is not in 1..capacity (of a new draw), the source is unknown, or the draw had another
                size before.
            OSError: the disk refused; asking again gives the rows that were drawn all the same.
        """
        lane = self._lane(key.source)
        whole = count if whole is None else whole
        logged = self._logged(key, whole)
        if logged is not None and len(logged.rows) >= count:
            if len(logged.rows) > count:
                raise ValueError(_other_size(key, len(logged.rows), count))
            self._replayed[key.source] += count
            return self._answer(logged, repeated=True)
        if not 1 <= count <= self._settings.capacity:
            raise ValueError(
                f"a draw of {count} trajectories can never be served: the buffer holds {self._settings.capacity} per "
                "source; lower the batch or raise buffer.capacity"
            )
        self._prepare_draw(policy_version)
        rows = self._sample(key, count, lane, logged)
        if rows is None:
            self._upkeep.tidy()
            return None
        shard = self._shard
        shard.log.append_draw(LoggedDraw(key, shard.newest_version, rows, whole))
        tally = shard.tallies[key.source]
        tally.draws += logged is None
        tally.drawn += len(rows)
        counted = lane.count_draw(rows)
        self._removals.exhaust(key.source, lane.exhausted(counted))
        drawn = shard.log.find(key)
        assert drawn is not None, "it was logged just now"
        result = self._answer(drawn, repeated=False, counted=counted if logged is None else None)
        self._removals.evict()
        self._upkeep.tidy()
        return result

    def has_drawn(self, key: DrawKey) -> bool:
        """Whether the draw is one that would be repeated."""
        return self._shard.log.find(key) is not None

    def num_logged(self, key: DrawKey) -> int:
        """Rows that this shard gave to the draw before."""
        logged = self._shard.log.find(key)
        return 0 if logged is None else len(logged.rows)

    def num_available(self, key: DrawKey, whole: int, policy_version: int) -> int:
        """Rows that this shard could add to a draw of `whole` rows now, `min_size` aside; drops what must not be drawn.

        Raises:
            ValueError: the draw had another size before. OSError: the disk refused.
        """
        logged = self._logged(key, whole)
        self._prepare_draw(policy_version)
        lane = self._lane(key.source)
        return len(lane) - (0 if logged is None else int(np.count_nonzero(lane.is_live(logged.rows))))

    def update_priorities(self, rows: Int64, priorities: Float32, source: str = "policy") -> None:
        """Change how likely distinct rows of `source` are drawn with sampler=prioritised; rows that are gone are passed
        over.

        rows: [n] as in `DrawResult`. priorities: [n], finite and not negative.

        Raises:
            ValueError: the sampler goes by no priorities, or they are not what they should be.
            OSError: the disk refused; nothing has changed.
        """
        if self._settings.sampler != "prioritised":
            raise ValueError(f"priorities have no effect with buffer.sampler={self._settings.sampler}")
        if len(rows) != len(priorities) or len(np.unique(rows)) != len(rows):
            raise ValueError(f"{len(priorities)} priorities for {len(rows)} rows: each row needs one")
        if not np.all(np.isfinite(priorities) & (priorities >= 0.0)):
            raise ValueError("a priority is a finite number, not negative")
        lane = self._lane(source)
        self._shard.log.append(Event("priorities", source=source, rows=rows, priorities=priorities))
        lane.update_priorities(rows, priorities)
        self._upkeep.tidy()

    def checkpointed(self, stage: str, step: int) -> None:
        """The learner has a durable checkpoint of `stage` after `step` steps: no draw before it will be repeated.

        Raises:
            OSError: the disk refused.
        """
        self._shard.log.checkpointed(stage, step)
        self._upkeep.tidy()

    def begin_stage(self, first_version: int) -> None:
        """From now on no policy row with an action older than `first_version` is drawn, nor one that still comes in.

        Raises:
            OSError: the disk refused.
        """
        if first_version != self._shard.first_version:
            self._shard.log.append(Event("stage", policy_version=first_version))
            self._shard.first_version = first_version

    def status(self) -> StoreStatus:
        """Counters of now."""
        shard = self._shard
        return StoreStatus(
            sources={source: self._counters(source) for source in SOURCES},
            rejected=shard.rejected,
            lost=shard.lost,
            newest_version=shard.newest_version,
            sealed_segments=len(shard.files.entries),
            size_bytes=shard.files.size_bytes,
            cut_bytes=shard.cut_bytes,
            quarantined=self._quarantined,
            unarchived_segments=self._upkeep.num_unarchived,
            upkeep_error=self._upkeep.error,
        )

    # What takes long, beside the work of the store

    def plan_upkeep(self) -> RewritePlan | None:
        """Evict what is too old, then find segments that are worth rewriting. `RewritePlan.run` may go on in any thread
        while the store works; afterwards comes `finish_upkeep`, or `fail_upkeep` with the error.

        Raises:
            OSError: the disk refused.
        """
        self._removals.evict()
        self._upkeep.tidy()
        return self._upkeep.plan()

    def finish_upkeep(self, rewrite: Rewrite) -> None:
        """Put the result of `RewritePlan.run` in the place of the old segments.

        Raises:
            OSError: the disk refused.
        """
        self._upkeep.finish(rewrite)

    def fail_upkeep(self, error: OSError) -> None:
        """`RewritePlan.run` raised this: the old segments stay, and `plan_upkeep` waits a while before the next one."""
        self._upkeep.fail(error)

    def prepare_sync(self) -> Callable[[], None]:
        """What `fsync_interval_s` asks for, as a function that may run in any thread, also while the store works."""
        syncs = (self._shard.files.prepare_sync(), self._shard.log.prepare_sync())  # rows before what is said of them

        def sync() -> None:
            for each in syncs:
                each()

        return sync

    def sync(self) -> None:
        """Make everything durable that was acknowledged.

        Raises:
            OSError: the disk refused.
        """
        self.prepare_sync()()

    def close(self) -> None:
        """Make everything durable and let go of the folder; the store is of no use afterwards."""
        self._upkeep.close()
        self._shard.files.close()
        self._shard.log.close()
        self._lock.release()

    def _lane(self, source: str) -> Lane:
        if source not in self._shard.lanes:
            raise ValueError(f"source {source!r} is none of {', '.join(SOURCES)}")
        return self._shard.lanes[source]

    # Drawing

    def _logged(self, key: DrawKey, whole: int) -> LoggedDraw | None:
        logged = self._shard.log.find(key)
        if logged is not None and logged.whole != whole:
            raise ValueError(_other_size(key, logged.whole, whole))
        return logged

    def _prepare_draw(self, policy_version: int) -> None:
        """A row of a newer version proves its publication, so staleness counts from the newest version known."""
        if policy_version > self._shard.newest_version:
            self._shard.log.append(Event("version", policy_version=policy_version))
            self._shard.newest_version = policy_version
        self._removals.drop_stale()

    def _sample(self, key: DrawKey, count: int, lane: Lane, logged: LoggedDraw | None) -> Int64 | None:
        """Live rows for a new draw, or for the rest of one; None where there are too few."""
        if logged is None:
            has_begun = self._shard.tallies[key.source].draws > 0
            if len(lane) < max(count, 0 if has_begun else self._settings.min_size):
                return None
            return lane.sample(count, self._generator(key, 0))
        missing = count - len(logged.rows)
        num_logged_live = int(np.count_nonzero(lane.is_live(logged.rows)))
        if len(lane) < missing + num_logged_live:
            return None
        # Those that are drawn already are passed over: the others come as if they had been drawn one by one.
        rows = lane.sample(missing + num_logged_live, self._generator(key, len(logged.rows)))
        return rows[~np.isin(rows, logged.rows)][:missing]

    def _generator(self, key: DrawKey, num_logged: int) -> np.random.Generator:
        return self._numbers.of(key.stage, key.step, key.source, num_logged)

    def _answer(self, draw: LoggedDraw, repeated: bool, counted: Drawn | None = None) -> DrawResult:
        """counted: what the lane remembers of all rows, None where some may not be live any more."""
        batch = self._shard.files.take(draw.rows)
        now_s = self._clock()
        if counted is None:
            last = LastDraw.from_batch(batch, draw.policy_version, now_s)
        else:
            last = LastDraw(counted.oldest_version, counted.created_us, draw.policy_version, now_s)
        self._last_draw[draw.key.source] = last
        return DrawResult(batch, draw.rows, draw.policy_version, repeated)

    # Inserting

    def _store(self, good: pa.RecordBatch, hashes: UInt64) -> None:
        """Rows that were validated: into the segment, then live for now. hashes: of their ids."""
        shard = self._shard
        end_row = shard.next_row + good.num_rows
        numbered = with_rows(good, np.arange(shard.next_row, end_row))
        shard.files.append(numbered)
        shard.next_row = end_row
        versions = VersionRange.from_batch(good)
        shard.newest_version = max(shard.newest_version, int(versions.newest.max()))
        facts = RowFacts.from_batch(numbered, versions)
        shard.known.add(hashes, facts.row)
        sources = source_codes(good.column("source"))
        for index, source in enumerate(SOURCES):
            if (mask := sources == index).any():
                own = facts.where(mask)
                shard.tallies[source].inserted += len(own)
                shard.lanes[source].append(own)

    def _counters(self, source: str) -> SourceCounters:
        tally, last_draw = self._shard.tallies[source], self._last_draw[source]
        return SourceCounters(
            inserted=tally.inserted,
            live=len(self._shard.lanes[source]),
            removed={reason: count for reason, count in sorted(tally.removed.items()) if count},
            draws=tally.draws,
            drawn=tally.drawn,
            replayed=self._replayed[source],
            last_draw=None if last_draw is None else last_draw.statistics(),
        )


def _other_size(key: DrawKey, before: int, now: int) -> str:
    return (
        f"step {key.step} of stage {key.stage!r} drew {before} {key.source} trajectories before it was interrupted, "
        f"and asks for {now} now: resume with the batch sizes that the run began with"
    )
