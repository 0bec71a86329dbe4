"""A shard's segments and log as flat arrays, for checks that look at every row and every event at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from buffer.reading.shard_snapshot import ShardSnapshot
from buffer.store.events import DROPPED, EVICTED, Counters, Event, decode_events
from buffer.trajectory.schema import ROW, SOURCES
from buffer.trajectory.staleness import VersionRange

Bool = npt.NDArray[np.bool_]
Int8 = npt.NDArray[np.int8]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
T = TypeVar("T")

REASONS = (*EVICTED, *DROPPED)
"""Why a row ceases to be live."""

UNKNOWN = -1
"""In the place of an index into SOURCES: a row was lost before anybody read its source."""


@dataclass(frozen=True)
class NamedRows:
    """Rows that events of one kind name, an entry per row and event.

    rows: [n] numbers; events: [n] places of the events in the log, ascending; sources: [n] index into SOURCES.
    """

    rows: Int64
    events: Int64
    sources: Int8

    def num_before(self, event: int) -> int:
        """How many entries the log has before the place `event`."""
        return int(np.searchsorted(self.events, event))


@dataclass(frozen=True)
class StoredRows:
    """Rows in the segments. rows: [n] numbers, ascending; live: [n]; sources: [n] index into SOURCES; oldest: [n]
    oldest policy version."""

    rows: Int64
    live: Bool
    sources: Int8
    oldest: Int32

    def find(self, rows: Int64) -> Int64:
        """[m] places of these rows; -1 where a row is not stored."""
        if not len(self.rows):
            return np.full(len(rows), -1)
        places = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        return np.where(self.rows[places] == rows, places, -1)


@dataclass(frozen=True)
class LoggedState:
    """What a file of the log begins with. event: its place in the log; shard, sources: the snapshots."""

    event: int
    shard: Event
    sources: dict[str, Event]

    @property
    def next_row(self) -> int:
        """Rows from this number on came later."""
        return given(self.counters().next_row)

    def counters(self, source: str | None = None) -> Counters:
        """Counts of a source, or of the shard."""
        return given((self.shard if source is None else self.sources[source]).counters)


class ShardHistory:
    """Everything a shard says of its rows.

    log: its events. next_row: every number below was given to a row. states: of the log's files, at least one. drawn,
    removed, sealed: what draws, removals and seals name; reasons: [removed] index into REASONS.
    """

    def __init__(self, snapshot: ShardSnapshot) -> None:
        """Take a snapshot apart.

        Raises:
            CorruptSegmentError: the shard has no log.
        """
        self.log = snapshot.events
        self.next_row = snapshot.next_row
        self.stored = _stored_rows(snapshot)
        self.states = _states(self.log)
        if not self.states:
            raise ValueError(
                f"{snapshot.folder} has no consumption log: the shard was created this moment, or it is lost"
            )
        self.drawn = self._named("draw")
        self.removed = self._named("remove")
        self.sealed = self._named("seal")
        reasons = pc.index_in(self.log.column("reason"), pa.array(REASONS)).fill_null(UNKNOWN).to_numpy()
        self.reasons: Int64 = reasons[self.removed.events]
        self._ids = _known_ids(snapshot, self.log, self.removed.rows[self.stored.find(self.removed.rows) < 0])

    @property
    def ids(self) -> pa.Table:
        """Columns `row` and `id`: a line per row whose id is known, be it stored or removed."""
        return self._ids

    def names(self, rows: Int64) -> tuple[str, ...]:
        """Ids of rows; `row N` where the shard knows none."""
        places = pc.index_in(pa.array(rows), self._ids.column(ROW).combine_chunks())
        ids = self._ids.column("id").take(places).to_pylist()
        return tuple(id_ or f"row {row}" for id_, row in zip(ids, rows.tolist(), strict=True))

    def rows_of_source(self, index: int) -> Int64:
        """Ascending numbers of the rows of a source: stored ones, and those that the log says were stored once."""
        stored = self.stored.rows[self.stored.sources == index]
        logged = [named.rows[named.sources == index] for named in (self.sealed, self.removed)]
        return np.unique(np.concatenate([stored, *logged]))

    def _named(self, kind: str) -> NamedRows:
        lists = self.log.column("rows").combine_chunks()
        events = pc.list_parent_indices(lists).to_numpy()
        chosen = pc.equal(self.log.column("event"), kind).to_numpy()[events]
        events = events[chosen]
        sources = pc.index_in(self.log.column("source"), pa.array(SOURCES)).fill_null(UNKNOWN).to_numpy()
        return NamedRows(pc.list_flatten(lists).to_numpy()[chosen], events, sources.astype(np.int8)[events])


def given(value: T | None) -> T:
    """A field of an event that events of its kind always have."""
    assert value is not None, "the checksum holds, so the event is as this program wrote it"
    return value


def _stored_rows(snapshot: ShardSnapshot) -> StoredRows:
    table = snapshot.stored
    oldest = [VersionRange.from_batch(batch).oldest for batch in table.to_batches()]
    return StoredRows(
        rows=table.column(ROW).to_numpy(),
        live=snapshot.live,
        sources=pc.index_in(table.column("source"), pa.array(SOURCES)).to_numpy().astype(np.int8),
        oldest=np.concatenate([np.empty(0, dtype=np.int32), *oldest]),
    )


def _states(log: pa.Table) -> list[LoggedState]:
    places = np.flatnonzero(pc.equal(log.column("event"), "snapshot").to_numpy())
    events = [event for batch in log.take(places).to_batches() for event in decode_events(batch)]
    begins = [index for index, event in enumerate(events) if event.source is None]
    return [
        LoggedState(int(places[begin]), events[begin], {str(each.source): each for each in events[begin + 1 : end]})
        for begin, end in zip(begins, [*begins[1:], len(events)], strict=True)
    ]


def _known_ids(snapshot: ShardSnapshot, log: pa.Table, gone: Int64) -> pa.Table:
    """Ids of stored rows, and of the removed rows `gone` that are not stored."""
    removals = log.filter(pc.equal(log.column("event"), "remove"))
    removed = pa.table({ROW: pc.list_flatten(removals.column("rows")), "id": pc.list_flatten(removals.column("ids"))})
    removed = removed.filter(pc.is_in(removed.column(ROW), value_set=pa.array(gone)))
    both = pa.concat_tables([snapshot.stored.select([ROW, "id"]), removed], promote_options="permissive")
    return both.filter(both.column("id").is_valid())
