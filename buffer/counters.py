"""What a replay store tells of itself."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from buffer.validation import Rejection


@dataclass(frozen=True)
class InsertResult:
    """accepted: rows now durable (see `fsync` of the settings); rejections: the others, with reasons."""

    accepted: int
    rejections: tuple[Rejection, ...]


@dataclass(frozen=True)
class DrawResult:
    """The rows of a draw. policy_version: newest one known when they were drawn first; repeated: that was before."""

    batch: pa.RecordBatch
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
class SourceCounters:
    """Rows of one source. inserted = live + evicted + dropped_stale.

    These count since the folder exists; drawn and replayed (a row counts each time) since this process opened it.
    replayed: given again to a learner that repeats steps after a restart.
    """

    inserted: int
    live: int
    evicted: int
    dropped_stale: int
    drawn: int
    replayed: int
    last_draw: DrawStatistics | None


@dataclass(frozen=True)
class StoreStatus:
    """Counters of a store.

    rejected: rows refused since this process opened the folder. cut_bytes: torn bytes cut off the open segment then.
    """

    sources: dict[str, SourceCounters]
    rejected: int
    newest_version: int
    sealed_segments: int
    size_bytes: int
    cut_bytes: int
