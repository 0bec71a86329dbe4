"""An open shard: its files, its catalog and their state in memory; the results and the status of a store.

The shard commits every event to the catalog before the event takes effect in memory, so a full disk changes nothing.
Opening a shard applies the same events again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from buffer.settings import BufferSettings
from buffer.store.catalog import FACTS, REASONS, BatchEntry, CatalogWriter, EventEntry
from buffer.store.gather import Gather, mark_null_items
from buffer.store.segments import Segments, message_checksum
from buffer.store.table import FIRST_PRIORITY, NO_ROWS, KnownIds, ReplayTable, UInt64
from buffer.trajectory.schema import SOURCES, TokenContract, stored_schema, with_rows
from buffer.trajectory.staleness import NO_VERSION, Int32, Int64, VersionRange, staleness
from buffer.trajectory.validation import Rejection, source_codes


@dataclass(frozen=True)
class SampleKey:
    """Identifies one sample of a run. step: number of steps of the stage before it."""

    stage: str
    step: int
    source: str


@dataclass(frozen=True)
class InsertResult:
    """accepted: rows stored by this insert (see `fsync` of the settings); present: rows that were stored before, as by
    an insert whose answer was lost; rejections: the other rows, with reasons."""

    accepted: int
    rejections: tuple[Rejection, ...]
    present: int = 0


@dataclass(frozen=True)
class SampleResult:
    """The rows of a sample. rows: their numbers in the shard, in the same order; policy_version: newest version known
    when they were first sampled; repeated: whether an earlier call got the same rows."""

    batch: pa.RecordBatch
    rows: Int64
    policy_version: int
    repeated: bool


@dataclass(frozen=True)
class SampleStatistics:
    """Means over the rows of one sample. Staleness in published versions, age in seconds since creation."""

    staleness_mean: float
    age_mean_s: float

    @classmethod
    def of(cls, oldest_version: Int32, created_us: Int64, policy_version: int, at_s: float) -> SampleStatistics:
        """oldest_version: [n] of each row, NO_VERSION where it has none. created_us: [n]. policy_version: newest one
        known at the sample. at_s: time of the sample, in seconds since the epoch."""
        ages_s = np.maximum(at_s - created_us / 1e6, 0.0)
        return cls(float(staleness(policy_version, oldest_version).mean()), float(ages_s.mean()))


@dataclass
class SourceCounters:
    """Rows of one source: inserted = live + removed.

    inserted, removed (by reason, see `buffer.store.catalog`), sample_calls, sampled (a row counts each time): since the
    folder was created, without repeated samples. replayed: rows given again to a learner that repeats steps after a
    restart, since this process opened the folder. live, last_sample: at the time of the status.
    """

    inserted: int = 0
    live: int = 0
    removed: dict[str, int] = field(default_factory=dict)
    sample_calls: int = 0
    sampled: int = 0
    replayed: int = 0
    last_sample: SampleStatistics | None = None

    @property
    def dropped_stale(self) -> int:
        """Rows dropped because their weights are too old: by version, or of an earlier stage."""
        return self.removed.get("stale", 0) + self.removed.get("stage", 0)


@dataclass(frozen=True)
class StoreStatus:
    """Counters of a store.

    rejected: rows refused since the folder was created. size_bytes: filled bytes of the segments. quarantined: names of
    the damaged bytes that were moved to quarantine since then. maintenance_error: why the last rewriting or archiving
    of files failed.
    """

    sources: dict[str, SourceCounters]
    rejected: int
    sealed_segments: int
    size_bytes: int
    quarantined: tuple[str, ...]
    maintenance_error: str | None = None


@dataclass(frozen=True)
class LoggedSample:
    """Rows that this shard gave to a sample, in order. policy_version: newest version known then; whole: rows of the
    sample over all shards.

    Version numbers continue after a restart: weights that are published again get new numbers. A sample is repeated
    without a check of staleness, since its rows were fresh when they were first sampled. New samples count staleness
    from the new numbers. These exceed the old ones by the publications that the restart adds or repeats, so the bound
    on staleness becomes stricter, never weaker.
    """

    rows: Int64
    policy_version: int
    whole: int


class Shard:
    """One shard whose folder is locked. counts: by source. first_version: of the stage. Not thread-safe. An OSError of
    any method says that the disk refused, and nothing has changed."""

    def __init__(
        self, folder: Path, contract: TokenContract, settings: BufferSettings, clock: Callable[[], float]
    ) -> None:
        """Open the catalog; `buffer.store.recovery` fills the rest with what the folder holds. Raises as
        `CatalogWriter`."""
        self.folder = folder
        self.catalog = CatalogWriter(folder, contract, settings.fsync == "batch", clock)
        self.table = ReplayTable()
        self.segments = Segments(folder, stored_schema(contract), settings, self.catalog)
        self.gather = Gather(self.table, self.segments)
        self.known = KnownIds(self.table, np.empty(0, np.uint64))
        self.logged_samples: dict[SampleKey, LoggedSample] = {}
        """Samples that no checkpoint covers yet: a resumed learner gets the same rows again."""
        self.counts = {source: SourceCounters(removed=dict.fromkeys(REASONS, 0)) for source in SOURCES}
        self.newest_version = NO_VERSION
        self.first_version = 0
        self.rejected = 0
        self._keeps_priorities = settings.sampler == "prioritized"

    @property
    def next_row(self) -> int:
        """Rows inserted since the folder was created."""
        return self.catalog.next_row

    @property
    def pinned_rows(self) -> Int64:
        """[n] rows of samples that may be repeated; their bytes are kept even if they are no longer live."""
        return np.unique(np.concatenate([NO_ROWS, *(sample.rows for sample in self.logged_samples.values())]))

    def append(self, batch: pa.RecordBatch, hashes: UInt64, events: Sequence[EventEntry] = ()) -> None:
        """Store validated rows, which become live. hashes: of their ids. events: committed with them. After an OSError
        they are not stored; if the process dies before the next insert, they may be. ValueError where the batch is too
        large for a file."""
        rows = np.arange(self.next_row, self.next_row + batch.num_rows)
        segment, offset, message = self.segments.write(mark_null_items(with_rows(batch, rows)))
        self.add(batch, hashes, segment, offset, message, events)

    def add(
        self,
        batch: pa.RecordBatch,
        hashes: UInt64,
        segment: int,
        offset: int,
        message: memoryview,
        events: Sequence[EventEntry] = (),
    ) -> None:
        """Commit a batch whose message is in its segment; see `append`."""
        versions = VersionRange.from_batch(batch)
        facts = np.empty(batch.num_rows, FACTS)
        facts["hash"], facts["oldest_version"] = hashes, versions.oldest
        facts["created_us"] = batch.column("created_at").view(pa.int64()).to_numpy()
        facts["source"] = codes = source_codes(batch.column("source"))
        facts["priority"] = FIRST_PRIORITY
        if self._keeps_priorities:
            facts["priority"] = np.array([self.table.largest_priority(source) for source in SOURCES])[codes]
        entry = BatchEntry(
            first_row=self.next_row,
            num_rows=batch.num_rows,
            segment=segment,
            offset=offset,
            length=len(message),
            newest_version=int(versions.newest.max()),
            message_checksum=message_checksum(message),
            rows=None,
            facts=facts.tobytes(),
        )
        # Without a sync: a batch that is in the segment, but not in the catalog, is adopted when the shard is opened.
        self.catalog.commit([entry, *events], durable=bool(events))
        self.add_rows(entry.row_numbers, facts, segment, entry.newest_version)
        self.add_message(entry)
        self.known.add(hashes)
        for event in events:
            self.apply(event)

    def add_rows(self, rows: Int64, facts: npt.NDArray[np.void], segments: Int64 | int, newest_version: int) -> None:
        """Mark rows of the catalog as live; numbers ascend, above all earlier ones. segments: of each row."""
        self.table.add(rows, facts, segments)
        self.newest_version = max(self.newest_version, newest_version)
        for source, count in zip(SOURCES, np.bincount(facts["source"], minlength=len(SOURCES)).tolist(), strict=True):
            self.counts[source].inserted += count

    def add_message(self, entry: BatchEntry) -> None:
        """Register where the bytes of a batch are stored."""
        self.segments.add_message(entry)
        self.gather.add(entry.segment, entry.offset, entry.length)

    def record(self, *events: EventEntry, durable: bool = True) -> None:
        """Commit these events and apply them. durable: see `CatalogWriter.commit`."""
        self.catalog.commit(events, durable)
        for event in events:
            self.apply(event)

    def apply(self, event: EventEntry) -> None:
        """Apply an event of the catalog, except to stored bytes (`delete`)."""
        rows, table = event.row_numbers, self.table
        source, step, version = event.source or "", event.step or 0, event.version
        key = SampleKey(event.stage or "", step, source)
        if event.kind == "stage":
            self.first_version = version or 0
        elif version is not None:
            self.newest_version = max(self.newest_version, version)
        match event.kind:
            case "draw":
                counts = self.counts[source]
                counts.sample_calls += key not in self.logged_samples
                counts.sampled += len(rows)
                table.times_sampled[table.slots(rows[table.is_known(rows)])] += 1
                if key in self.logged_samples:  # an interruption left it incomplete
                    rows = np.concatenate([self.logged_samples[key].rows, rows])
                self.logged_samples[key] = LoggedSample(
                    rows, NO_VERSION if version is None else version, event.whole or 0
                )
            case "remove":
                self.counts[source].removed[event.reason or ""] += len(rows)
                table.remove(rows)
            case "checkpoint":
                # Only one stage runs at a time, so samples of the others are never repeated.
                self.logged_samples = {
                    each: sample
                    for each, sample in self.logged_samples.items()
                    if each.stage == key.stage and each.step >= step
                }
            case "forget":
                self.logged_samples.pop(key, None)
            case "reject":
                self.rejected += len(json.loads(event.ids or "[]"))
            case "priorities":
                is_known = table.is_known(rows)
                values = np.frombuffer(event.priorities or b"", np.float32)
                table.priority[table.slots(rows[is_known])] = values[is_known]
