"""The replay store of one shard: durable inserts, capacity, age, strict staleness, samples that can be repeated.

    insert: validate -> bytes in the open segment -> catalog (acknowledged) -> evict beyond capacity and age
    sample: known to the catalog? the same rows again. Else: drop stale rows -> choose -> catalog -> gather

Capacity counts per source, and each sample has one source. The store commits every event with its reason to the
catalog, and changes its memory after the commit, so a full disk changes nothing. Rows that are no longer live stay on
disk while a sample pins them. Then they are deleted with their file, or when the file is rewritten.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from buffer.disk import FolderLock
from buffer.settings import BufferSettings
from buffer.store.catalog import EventEntry
from buffer.store.maintenance import Archive, Maintenance
from buffer.store.recovery import open_shard, quarantined
from buffer.store.sampling import make_sampler, sample_generator
from buffer.store.shard import (
    InsertResult,
    LoggedSample,
    SampleKey,
    SampleResult,
    SampleStatistics,
    SourceCounters,
    StoreStatus,
)
from buffer.store.table import Float32, hash_ids
from buffer.trajectory.schema import SOURCES, TokenContract
from buffer.trajectory.staleness import Int64
from buffer.trajectory.validation import Rejection, validate


class ReplayStore:
    """The trajectories of one folder. One process at a time, not thread-safe.

    maintenance: eviction, deletion and rewriting of files. An OSError of any method means that the disk refused; the
    call may be repeated, and finds what was stored or sampled before the error.
    """

    def __init__(
        self,
        folder: Path,
        contract: TokenContract,
        settings: BufferSettings,
        seed: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open `folder`, creating it where absent, and restore its live rows.

        seed: of the samples. clock: seconds since the epoch.

        Raises:
            ValueError: another process has the folder open, an earlier version of this program wrote it, its rows
                follow another token contract, the archive's URL names no file system, or the sampler does not exist
                (see `buffer.custom.make_custom`).
            CorruptStoreError: the catalog is damaged.
        """
        self._folder = folder
        self._contract = contract
        self._settings = settings
        self._sample = make_sampler(settings)
        self._seed = seed
        self._clock = clock
        self._statistics: dict[str, Callable[[], SampleStatistics]] = {}  # of the last sample, by source
        folder.mkdir(parents=True, exist_ok=True)
        archive = None if settings.archive is None else Archive(settings.archive, folder)
        self._lock = FolderLock(folder)
        try:
            self._shard = open_shard(folder, contract, settings, clock)
            self.maintenance = Maintenance(settings, self._shard, archive, clock)
            self._quarantined = quarantined(folder)
            self.maintenance.evict_oversampled()
            self.maintenance.evict()
            self.maintenance.delete_unneeded()
        except BaseException:
            self._lock.release()
            raise

    @property
    def newest_version(self) -> int:
        """Newest policy version in a row or of a sample request; -1 before any."""
        return self._shard.newest_version

    @property
    def next_row(self) -> int:
        """Rows inserted since the folder was created."""
        return self._shard.next_row

    def num_live(self, source: str) -> int:
        """Live rows of `source`."""
        _check_source(source)
        return self._shard.table.num_live(source)

    def counters(self, source: str) -> SourceCounters:
        """Current counters, without the statistics of the last sample."""
        counts = self._shard.counts[source]
        counts.live = self._shard.table.num_live(source)
        return counts

    def insert(self, batch: pa.RecordBatch) -> InsertResult:
        """Validate and store a batch; on return the accepted rows are in the segment and in the catalog.

        A row whose id is already stored, or was deleted recently, is skipped and counted as present, so an insert whose
        answer was lost may be repeated.

        Raises:
            ValueError: the whole batch is refused (see `buffer.trajectory.validation.validate`).
        """
        checked = validate(batch, self._contract)
        good, hashes = checked.good, hash_ids(checked.good.column("id"))
        known = self._shard.known.knows(hashes)
        if known.any():
            good, hashes = good.filter(pa.array(~known)), hashes[~known]
        rejected = _rejections(checked.rejections)
        if good.num_rows:
            self._shard.append(good, hashes, rejected)
        elif rejected:
            self._shard.record(*rejected)
        self.maintenance.evict()
        self.maintenance.delete_unneeded()
        return InsertResult(good.num_rows, checked.rejections, int(known.sum()))

    def sample(self, key: SampleKey, count: int, policy_version: int, whole: int | None = None) -> SampleResult | None:
        """The rows that the sample `key` got before; for a new key, `count` distinct live rows of its source, none
        staler than `max_staleness`. Same seed, key and contents: same rows.

        policy_version: newest published version that the caller knows. whole: rows of the sample over all shards, of
        which this shard gives `count`; None = all of them. If the sample got fewer rows before, it gets the missing
        ones. None while too few rows are live: fewer than `count`, or than `min_size` before the first sample. A new
        sample first drops stale rows, also where the answer is None.

        Raises:
            ValueError: `count` is not in 1..capacity (of a new sample), the source is unknown, or the sample had
                another size before.
        """
        _check_source(key.source)
        whole = count if whole is None else whole
        noted = self._noted(key, whole)
        if noted is not None and len(noted.rows) >= count:
            if len(noted.rows) > count:
                raise ValueError(_other_size(key, len(noted.rows), count))
            self._shard.counts[key.source].replayed += count
            return self._answer(key, noted, repeated=True)
        if not 1 <= count <= self._settings.capacity:
            raise ValueError(
                f"a sample of {count} trajectories can never be served: the buffer holds {self._settings.capacity} per "
                "source; lower the batch or raise buffer.capacity"
            )
        self._prepare_sample(policy_version)
        rows = self._choose(key, count, noted)
        if rows is None:
            self.maintenance.delete_unneeded()
            return None
        self._note(key, rows, whole)
        result = self._answer(key, self._shard.logged_samples[key], repeated=False)
        self.maintenance.delete_unneeded()
        return result

    def num_logged(self, key: SampleKey) -> int:
        """Rows that this shard gave to the sample so far."""
        noted = self._shard.logged_samples.get(key)
        return 0 if noted is None else len(noted.rows)

    def num_available(self, key: SampleKey, whole: int, policy_version: int) -> int:
        """Rows that this shard could add to a sample of `whole` rows now, `min_size` aside; drops stale rows first.
        ValueError where the sample had another size before."""
        noted, table = self._noted(key, whole), self._shard.table
        self._prepare_sample(policy_version)
        num_given = 0 if noted is None else int(np.count_nonzero(table.is_live(noted.rows)))
        return self.num_live(key.source) - num_given

    def update_priorities(self, rows: Int64, priorities: Float32, source: str = "policy") -> None:
        """Set the priorities of distinct rows of `source` for sampler=prioritized; deleted rows are skipped.

        rows: [n] as in `SampleResult`. priorities: [n], finite and not negative.

        Raises:
            ValueError: the sampler uses no priorities, or a priority is invalid.
        """
        if self._settings.sampler != "prioritized":
            raise ValueError(f"priorities have no effect with buffer.sampler={self._settings.sampler}")
        if len(rows) != len(priorities) or len(np.unique(rows)) != len(rows):
            raise ValueError(f"{len(priorities)} priorities for {len(rows)} rows: give each row one")
        if not np.all(np.isfinite(priorities) & (priorities >= 0.0)):
            raise ValueError("a priority must be finite and not negative")
        blob = priorities.astype("<f4").tobytes()
        self._shard.record(EventEntry("priorities", source=source, rows=rows.astype("<i8").tobytes(), priorities=blob))

    def checkpointed(self, stage: str, step: int) -> None:
        """The learner has a durable checkpoint of `stage` after `step` steps: no sample before it will be repeated."""
        self._shard.record(EventEntry("checkpoint", stage=stage, step=step))
        self.maintenance.delete_unneeded()

    def begin_stage(self, first_version: int) -> None:
        """From now on no policy row with an action older than `first_version` is sampled, even if inserted later."""
        if first_version != self._shard.first_version:
            self._shard.record(EventEntry("stage", version=first_version))

    def status(self) -> StoreStatus:
        """The current counters."""
        shard = self._shard
        return StoreStatus(
            sources={source: self._status_of(source) for source in SOURCES},
            rejected=shard.rejected,
            sealed_segments=len(shard.segments.stored) - 1,
            size_bytes=shard.segments.size_bytes,
            quarantined=self._quarantined,
            maintenance_error=self.maintenance.error,
        )

    def catalog_image(self) -> bytes:
        """A copy of the current catalog as an SQLite database, for readers on other hosts, which cannot open the file
        on a shared file system (see `sqlite3.Connection.deserialize`)."""
        return self._shard.catalog.image()

    def prepare_sync(self) -> Callable[[], None]:
        """A function that makes every commit until now durable; it may run in any thread while the store works."""
        # Segments first: the catalog must not name rows that are not durable.
        syncs = (self._shard.segments.prepare_sync(), self._shard.catalog.prepare_sync())

        def sync() -> None:
            for each in syncs:
                each()

        return sync

    def close(self) -> None:
        """Make everything durable and release the folder; the store cannot be used afterwards."""
        self._shard.segments.close()
        self._shard.catalog.close()
        self._lock.release()

    def _noted(self, key: SampleKey, whole: int) -> LoggedSample | None:
        noted = self._shard.logged_samples.get(key)
        if noted is not None and noted.whole != whole:
            raise ValueError(_other_size(key, noted.whole, whole))
        return noted

    def _prepare_sample(self, policy_version: int) -> None:
        # A row of a newer version proves its publication, so staleness counts from the newest version known.
        if policy_version > self._shard.newest_version:
            self._shard.record(EventEntry("version", version=policy_version), durable=False)
        self.maintenance.drop_stale()

    def _choose(self, key: SampleKey, count: int, noted: LoggedSample | None) -> Int64 | None:
        """Live rows for a new sample, or for the missing part of one; None where there are too few."""
        shard, table = self._shard, self._shard.table
        live = table.live_rows(key.source)
        if noted is None:
            missing, num_given = count, 0
            has_begun = shard.counts[key.source].sample_calls > 0
            least = count if has_begun else max(count, self._settings.min_size)
        else:
            num_given = len(noted.rows)
            missing = least = count - num_given
            live = live[~np.isin(live, noted.rows)]
        if len(live) < least:
            return None
        generator = sample_generator(self._seed, key.stage, key.step, key.source, num_given)
        return live[self._sample(len(live), missing, generator, lambda name: shard.gather.column(name, live))]

    def _note(self, key: SampleKey, rows: Int64, whole: int) -> None:
        shard, table = self._shard, self._shard.table
        sample = EventEntry(
            "draw",
            stage=key.stage,
            step=key.step,
            source=key.source,
            version=shard.newest_version,
            whole=whole,
            rows=rows.tobytes(),
        )
        exhausted = self.maintenance.exhausted(rows, table.times_sampled[table.slots(rows)] + 1)
        shard.record(sample, *self.maintenance.removal(key.source, "sampled", exhausted))

    def _answer(self, key: SampleKey, sample: LoggedSample, repeated: bool) -> SampleResult:
        shard, table = self._shard, self._shard.table
        slots = table.slots(sample.rows)
        self._statistics[key.source] = partial(
            SampleStatistics.of,
            table.oldest_version[slots],
            table.created_us[slots],
            sample.policy_version,
            self._clock(),
        )
        return SampleResult(shard.gather.take(sample.rows), sample.rows, sample.policy_version, repeated)

    def _status_of(self, source: str) -> SourceCounters:
        counters, statistics = self.counters(source), self._statistics.get(source)
        removed = {reason: count for reason, count in sorted(counters.removed.items()) if count}
        return replace(counters, removed=removed, last_sample=None if statistics is None else statistics())


def _check_source(source: str) -> None:
    if source not in SOURCES:
        raise ValueError(f"source {source!r} is none of {', '.join(SOURCES)}")


def _rejections(rejections: Sequence[Rejection]) -> list[EventEntry]:
    by_reason: dict[str, list[str | None]] = {}
    for rejection in rejections:
        by_reason.setdefault(rejection.reason, []).append(rejection.id)
    return [EventEntry("reject", reason=reason, ids=json.dumps(ids)) for reason, ids in by_reason.items()]


def _other_size(key: SampleKey, before: int, now: int) -> str:
    return (
        f"step {key.step} of stage {key.stage!r} sampled {before} {key.source} trajectories before the run was "
        f"interrupted, and asks for {now} now: resume with the batch sizes that the run began with"
    )
