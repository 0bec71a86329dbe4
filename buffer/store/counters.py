"""What a replay store tells of itself, and the counts behind it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from buffer.store.events import DROPPED, EVICTED, Counters
from buffer.trajectory.staleness import NO_VERSION, VersionRange
from buffer.trajectory.validation import Rejection

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class InsertResult:
    """accepted: rows stored by this insert (see `fsync` of the settings); present: rows that were stored already, as
    when an insert is repeated after a lost answer; rejections: the others, with reasons."""

    accepted: int
    rejections: tuple[Rejection, ...]
    present: int = 0


@dataclass(frozen=True)
class DrawResult:
    """The rows of a draw. rows: their numbers in the shard, in the same order; policy_version: newest one known when
    they were drawn first; repeated: that was before."""

    batch: pa.RecordBatch
    rows: Int64
    policy_version: int
    repeated: bool


@dataclass(frozen=True)
class DrawStatistics:
    """Of the rows of one draw. Staleness in published versions, age in seconds since creation."""

    staleness_mean: float
    staleness_max: int
    age_mean_s: float
    age_max_s: float


@dataclass(frozen=True)
class LastDraw:
    """What statistics of a draw are computed from, when they are asked for.

    oldest_version: [n] of each row, infinity where it has none. created_us: [n]. policy_version: newest one known at
    the draw. at_s: time of the draw, in seconds since the epoch.
    """

    oldest_version: Float64
    created_us: Float64
    policy_version: int
    at_s: float

    @classmethod
    def from_batch(cls, batch: pa.RecordBatch, policy_version: int, at_s: float) -> LastDraw:
        """Of the rows that a draw gave."""
        oldest = VersionRange.from_batch(batch).oldest
        created_us = batch.column("created_at").view(pa.int64()).to_numpy().astype(np.float64)
        return cls(np.where(oldest == NO_VERSION, np.inf, oldest), created_us, policy_version, at_s)

    def statistics(self) -> DrawStatistics:
        """Staleness (see `buffer.trajectory.staleness`) and age of the rows."""
        behind = np.maximum(self.policy_version - self.oldest_version, 0.0)
        ages_s = np.maximum(self.at_s - self.created_us / 1e6, 0.0)
        return DrawStatistics(float(behind.mean()), int(behind.max()), float(ages_s.mean()), float(ages_s.max()))


@dataclass
class Tally:
    """Counts of one source since the folder exists, to be carried on from one snapshot of the log to the next.

    inserted: rows; draws: without repeated ones; drawn: rows, each counted every time; removed: rows by reason.
    """

    inserted: int = 0
    draws: int = 0
    drawn: int = 0
    removed: Counter[str] = field(default_factory=Counter)

    def to_counters(self) -> Counters:
        """As they stand in a snapshot."""
        by_reason = {f"evicted_{reason}": self.removed[reason] for reason in EVICTED}
        by_reason |= {f"dropped_{reason}": self.removed[reason] for reason in DROPPED}
        return Counters(inserted=self.inserted, draws=self.draws, drawn=self.drawn, **by_reason)

    @classmethod
    def from_counters(cls, counters: Counters) -> Tally:
        """As they stood in a snapshot."""
        evicted = {reason: getattr(counters, f"evicted_{reason}") or 0 for reason in EVICTED}
        dropped = {reason: getattr(counters, f"dropped_{reason}") or 0 for reason in DROPPED}
        removed = Counter(evicted | dropped)
        return cls(counters.inserted or 0, counters.draws or 0, counters.drawn or 0, removed)


@dataclass(frozen=True)
class SourceCounters:
    """Rows of one source: inserted = live + evicted + dropped.

    These count since the folder exists; replayed (rows given again to a learner that repeats steps after a restart)
    since this process opened it. drawn: a row counts each time. removed: by reason, see `buffer.store.events`.
    """

    inserted: int
    live: int
    removed: dict[str, int]
    draws: int
    drawn: int
    replayed: int
    last_draw: DrawStatistics | None

    @property
    def evicted(self) -> int:
        """Rows that could have been drawn when they were removed."""
        return sum(self.removed.get(reason, 0) for reason in EVICTED)

    @property
    def dropped(self) -> int:
        """Rows that must not or cannot be drawn any more."""
        return sum(self.removed.get(reason, 0) for reason in DROPPED)

    @property
    def dropped_stale(self) -> int:
        """Rows that were dropped because the weights behind them are too old: by versions, or of an earlier stage."""
        return self.removed.get("stale", 0) + self.removed.get("stage", 0)


@dataclass(frozen=True)
class StoreStatus:
    """Counters of a store.

    rejected: rows refused since the folder exists. lost: rows whose file was damaged so that their source is unknown,
    so the sources' `inserted` and this make up all row numbers. size_bytes: of the segment files that count.
    cut_bytes: torn bytes cut off when this process opened the folder. quarantined: damaged files and parts of files
    that were put aside since the folder exists. unarchived_segments: files that wait for the archive before they can
    be deleted; upkeep_error: why files could not be rewritten or archived last.
    """

    sources: dict[str, SourceCounters]
    rejected: int
    lost: int
    newest_version: int
    sealed_segments: int
    size_bytes: int
    cut_bytes: int
    quarantined: tuple[str, ...]
    unarchived_segments: int = 0
    upkeep_error: str | None = None
