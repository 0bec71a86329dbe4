"""What a replay store answers, and what it tells of itself."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from buffer.store.catalog import DROPPED, EVICTED
from buffer.trajectory.staleness import staleness
from buffer.trajectory.validation import Rejection

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DrawKey:
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

    oldest_version: [n] of each row, NO_VERSION where it has none. created_us: [n]. policy_version: newest one known at
    the draw. at_s: time of the draw, in seconds since the epoch.
    """

    oldest_version: Int32
    created_us: Int64
    policy_version: int
    at_s: float

    def statistics(self) -> DrawStatistics:
        """Staleness (see `buffer.trajectory.staleness`) and age of the rows."""
        behind = staleness(self.policy_version, self.oldest_version)
        ages_s = np.maximum(self.at_s - self.created_us / 1e6, 0.0)
        return DrawStatistics(float(behind.mean()), int(behind.max()), float(ages_s.mean()), float(ages_s.max()))


@dataclass
class SourceCounters:
    """Rows of one source: inserted = live + evicted + dropped.

    inserted, drawn (a row counts each time), removed (by reason, see `buffer.store.catalog`), draws: since the folder
    exists, without repeated draws; replayed (rows given again to a learner that repeats steps after a restart): since
    this process opened it. live, last_draw: as of the status.
    """

    inserted: int = 0
    live: int = 0
    removed: dict[str, int] = field(default_factory=dict)
    draws: int = 0
    drawn: int = 0
    replayed: int = 0
    last_draw: DrawStatistics | None = None

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

    rejected: rows refused since the folder exists. size_bytes: of the segments, as far as they are filled.
    quarantined: names of the damaged bytes that were put aside since the folder exists. unarchived_segments: files that
    wait for the archive before they can be deleted; upkeep_error: why files could not be rewritten or archived last.
    """

    sources: dict[str, SourceCounters]
    rejected: int
    newest_version: int
    sealed_segments: int
    size_bytes: int
    quarantined: tuple[str, ...]
    unarchived_segments: int = 0
    upkeep_error: str | None = None
