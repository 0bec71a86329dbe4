"""An open shard: its files, its catalog and what both mean in memory; what it answers, and what it tells of itself.

Whatever happens is committed to the catalog first and takes effect in memory then, so that a full disk changes nothing.
An opening applies the same events again.
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
    """Names one draw of a run. step: steps of the stage that were done before it."""

    stage: str
    step: int
    source: str


@dataclass(frozen=True)
class InsertResult:
    """accepted: rows stored by this insert (see `fsync` of the settings); present: rows that were stored already, as
    when an insert is repeated after a lost answer; rejections: the others, with reasons."""

    accepted: int
    rejections: tuple[Rejection, ...]
    present: int = 0


@dataclass(frozen=True)
class SampleResult:
    """The rows of a draw. rows: their numbers in the shard, in the same order; policy_version: newest one known when
    they were drawn first; repeated: that was before."""

    batch: pa.RecordBatch
    rows: Int64
    policy_version: int
    repeated: bool


@dataclass(frozen=True)
class SampleStatistics:
    """Means over the rows of one draw. Staleness in published versions, age in seconds since creation."""

    staleness_mean: float
    age_mean_s: float

    @classmethod
    def of(cls, oldest_version: Int32, created_us: Int64, policy_version: int, at_s: float) -> SampleStatistics:
        """oldest_version: [n] of each row, NO_VERSION where it has none. created_us: [n]. policy_version: newest one
        known at the draw. at_s: time of the draw, in seconds since the epoch."""
        ages_s = np.maximum(at_s - created_us / 1e6, 0.0)
        return cls(float(staleness(policy_version, oldest_version).mean()), float(ages_s.mean()))


@dataclass
class SourceCounters:
    """Rows of one source: inserted = live + removed.

    inserted, drawn (a row counts each time), removed (by reason, see `buffer.store.catalog`), draws: since the folder
    exists, without repeated draws; replayed (rows given again to a learner that repeats steps after a restart): since
    this process opened it. live, last_sample: as of the status.
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
        """Rows that were dropped because the weights behind them are too old: by versions, or of an earlier stage."""
        return self.removed.get("stale", 0) + self.removed.get("stage", 0)


@dataclass(frozen=True)
class StoreStatus:
    """Counters of a store.

    rejected: rows refused since the folder exists. size_bytes: of the segments, as far as they are filled.
    quarantined: names of the damaged bytes that were put aside since the folder exists. maintenance_error: why files
    could
    not be rewritten or archived last.
    """

    sources: dict[str, SourceCounters]
    rejected: int
    sealed_segments: int
    size_bytes: int
    quarantined: tuple[str, ...]
    maintenance_error: str | None = None


@dataclass(frozen=True)
class LoggedSample:
    """What this shard gave to a draw: row numbers, in order. policy_version: newest version known then; whole: rows of
    the draw over all shards.

    Versions go on over a restart: weights that are published again on the way get new numbers, and a draw is repeated
    without a look at staleness, since its rows were fresh when they were first drawn. New draws count staleness from
    the new numbers. They exceed the old ones by the publications that a restart adds or repeats, so a bound on
    staleness is then kept more strictly, never less.
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
        """Those that no checkpoint covers yet: a learner that goes on from one is given the same rows again."""
        self.counts = {source: SourceCounters(removed=dict.fromkeys(REASONS, 0)) for source in SOURCES}
        self.newest_version = NO_VERSION
        self.first_version = 0
        self.rejected = 0
        self._keeps_priorities = settings.sampler == "prioritized"

    @property
    def next_row(self) -> int:
        """Rows inserted since the folder exists."""
        return self.catalog.next_row

    @property
    def pinned_rows(self) -> Int64:
        """[n] rows of draws that may be repeated, so that their bytes are kept though they may cease to be live."""
        return np.unique(np.concatenate([NO_ROWS, *(draw.rows for draw in self.logged_samples.values())]))

    def append(self, batch: pa.RecordBatch, hashes: UInt64, events: Sequence[EventEntry] = ()) -> None:
        """Store validated rows, which are live then. hashes: of their ids. events: committed with them. After an
        OSError they are not stored, unless the process dies before the next insert: then they may be. ValueError where
        the batch is too large for a file."""
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
        """A batch whose message is in its segment counts from now on; see `append`."""
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
        """Rows of the catalog, ascending, above all before, are live. segments: of each."""
        self.table.add(rows, facts, segments)
        self.newest_version = max(self.newest_version, newest_version)
        for source, count in zip(SOURCES, np.bincount(facts["source"], minlength=len(SOURCES)).tolist(), strict=True):
            self.counts[source].inserted += count

    def add_message(self, entry: BatchEntry) -> None:
        """The bytes of a batch are where the catalog says."""
        self.segments.add_message(entry)
        self.gather.add(entry.segment, entry.offset, entry.length)

    def record(self, *events: EventEntry, durable: bool = True) -> None:
        """Commit these events and apply them. durable: see `CatalogWriter.commit`."""
        self.catalog.commit(events, durable)
        for event in events:
            self.apply(event)

    def apply(self, event: EventEntry) -> None:
        """An event of the catalog takes effect, except on stored bytes (`delete`)."""
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
                # Stages follow one another, so no other one goes on.
                self.logged_samples = {
                    each: draw
                    for each, draw in self.logged_samples.items()
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
