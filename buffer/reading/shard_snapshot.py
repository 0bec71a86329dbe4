"""What a reader of one shard holds, and what the consumption log says of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from buffer.trajectory.schema import TokenContract

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class ShardSnapshot:
    """One shard at one moment.

    stored: all rows of its files (`stored_schema`), n of them, numbers ascending. live: [n] whether a draw may give the
    row; the others wait for their file to be deleted, or are pinned by a logged draw. times_sampled: [n] draws of the
    row. next_row: every number below was given to a row. events: the consumption log (`EVENT_SCHEMA`). newest_version:
    newest policy version seen, NO_VERSION before any.
    """

    folder: Path
    contract: TokenContract
    next_row: int
    newest_version: int
    stored: pa.Table
    live: Bool
    times_sampled: Int32
    events: pa.Table


def event_rows(events: pa.Table, kind: str) -> Int64:
    """[n] row numbers that events of one kind name, in the order of the log."""
    chosen = events.column("rows").filter(pc.equal(events.column("event"), kind))
    rows: Int64 = pc.list_flatten(chosen).to_numpy()
    return rows


def live_rows(rows: Int64, events: pa.Table) -> Bool:
    """[n] whether each of the stored `rows` is live: not removed, nor dead when the oldest file of the log began."""
    begin = _first_snapshots(events)
    counters = pc.struct_field(begin.column("counters"), "next_row")
    first_new_row = pc.max(counters).as_py() or 0
    live: Bool = (rows >= first_new_row) | np.isin(rows, event_rows(begin, "snapshot"))
    return live & ~np.isin(rows, event_rows(events, "remove"))


def times_sampled(rows: Int64, events: pa.Table) -> Int32:
    """[n] how often each of the stored `rows` (ascending) was drawn; a draw that was repeated counts once."""
    begin = _first_snapshots(events)
    before = pc.list_flatten(begin.column("times_sampled")).to_numpy()
    drawn = np.concatenate([event_rows(events, "draw"), np.repeat(event_rows(begin, "snapshot"), before)])
    where = np.searchsorted(rows, drawn)
    stored = where < len(rows)
    stored[stored] = rows[where[stored]] == drawn[stored]
    return np.bincount(where[stored], minlength=len(rows)).astype(np.int32)


def _first_snapshots(events: pa.Table) -> pa.Table:
    """The snapshots that the oldest file of the log begins with: that of the shard, and those of its sources."""
    is_snapshot = pc.equal(events.column("event"), "snapshot").to_numpy()
    of_shard = is_snapshot & events.column("source").is_null().to_numpy()
    ends = np.flatnonzero(~is_snapshot | of_shard)
    ends = ends[ends > 0]
    return events.slice(0, int(ends[0]) if len(ends) else events.num_rows)
