"""From the files of a shard to what a store works with: which rows are live, and every count.

    live    rows of the log's snapshot, and rows in segments numbered from its next_row on, without those removed since
    lost    the same numbers, where no segment holds the row any longer: removed now, reason `quarantine`

so that each number below next_row is accounted for whatever happened to the files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from buffer.sampling.lane import Lane, LaneSnapshot
from buffer.sampling.row_facts import RowFacts
from buffer.settings import BufferSettings
from buffer.store.consumption_log import ConsumptionLog
from buffer.store.counters import Tally
from buffer.store.event_history import log_files, read_log_file
from buffer.store.events import Event, decode_events
from buffer.store.known_ids import REMEMBERED_ROWS, KnownIds, hash_ids
from buffer.store.log_state import LogState
from buffer.store.manifest import Manifest
from buffer.store.row_numbers import NO_ROWS, contains
from buffer.store.segment_files import SegmentFiles
from buffer.store.segment_folder import FoundRows, find_manifest, find_rows
from buffer.trajectory.schema import ROW, SOURCES, TokenContract, rows_of, stored_schema
from buffer.trajectory.staleness import VersionRange

Int8 = npt.NDArray[np.int8]
Int64 = npt.NDArray[np.int64]

_REMEMBERED_TOGETHER = 1024  # removed rows, which are also forgotten together
_UNKNOWN = -1  # in the place of a source's index


@dataclass
class ShardState:
    """A shard that is open. lost: rows of unknown source. cut_bytes: torn bytes cut off its files."""

    files: SegmentFiles
    log: ConsumptionLog
    lanes: dict[str, Lane]
    tallies: dict[str, Tally]
    known: KnownIds
    next_row: int
    newest_version: int
    first_version: int
    rejected: int
    lost: int
    cut_bytes: int


def open_shard(
    folder: Path, contract: TokenContract, settings: BufferSettings, clock: Callable[[], float]
) -> tuple[ShardState, bool]:
    """Open the files in `folder`, which is locked; True where the log has forgotten a draw and is to be rotated.

    Raises:
        CorruptSegmentError: the manifest or the log is damaged. ValueError: see `find_manifest`.
    """
    manifest = find_manifest(folder, contract)
    log = ConsumptionLog(folder, settings.fsync == "batch", clock)
    if manifest is None:
        manifest = Manifest(contract)
        manifest.write(folder)
    state = log.take_state()
    found = find_rows(folder, manifest, stored_schema(contract))
    if found.manifest != manifest:
        # Before the rows are noted as lost: a crash in between finds them missing all the same.
        found.manifest.write(folder)
    files = SegmentFiles(folder, stored_schema(contract), settings, found.manifest)
    fates = _Fates(state, found)
    versions = [VersionRange.from_batch(batch) for batch in found.batches]
    facts = [RowFacts.from_batch(batch, each) for batch, each in zip(found.batches, versions, strict=True)]
    lanes, tallies = {}, {}
    for index, source in enumerate(SOURCES):
        lanes[source] = _restored_lane(settings, state, fates, facts, source)
        tallies[source] = state.sources[source].tally
        tallies[source].inserted += fates.num_inserted(index)
    known = KnownIds(files.ids)
    live_rows = np.concatenate([NO_ROWS, *(lane.rows for lane in lanes.values())])
    live_rows.sort()
    for entry, segment in found.sealed:
        files.restore(entry, segment, int(contains(live_rows, segment.rows).sum()))
    for number, segment in found.opened:
        files.restore_open(number, segment)
    for batch in found.batches:
        named = batch.select(["id", ROW])  # before anything is copied
        live = named.filter(pa.array(contains(live_rows, rows_of(named))))
        known.add(hash_ids(live.column("id")), rows_of(live))
    _remember_removed(known, folder, state)
    shard = ShardState(
        files=files,
        log=log,
        lanes=lanes,
        tallies=tallies,
        known=known,
        next_row=fates.next_row,
        newest_version=max([state.newest_version, *(int(each.newest.max()) for each in versions)]),
        first_version=state.first_version,
        rejected=state.rejected,
        lost=state.lost,
        cut_bytes=log.cut_bytes + found.cut_bytes,
    )
    _note_lost(shard, fates)
    return shard, log.forget_unless(files.holds)


class _Fates:
    """What became of each row since the snapshot of the log, and of the snapshot's live rows."""

    def __init__(self, state: LogState, found: FoundRows) -> None:
        self.base = state.next_row
        self.next_row = max(self.base, found.next_row, found.manifest.next_row, state.last_row + 1)
        span = self.next_row - self.base
        self._source: Int8 = np.full(span, _UNKNOWN, dtype=np.int8)
        self._removed = np.zeros(span, dtype=np.bool_)
        self._present = np.zeros(span, dtype=np.bool_)
        self.old_live: dict[str, Int64] = {}
        self._old_lost: dict[str, Int64] = {}
        stored = np.concatenate([NO_ROWS, *(rows_of(batch) for batch in found.batches)])
        for index, source in enumerate(SOURCES):
            each = state.sources[source]
            for rows in chain(each.sealed, each.drawn, each.removed):
                self._source[self._since(rows)] = index
            removed = np.concatenate([NO_ROWS, *each.removed])
            self._removed[self._since(removed)] = True
            old = np.setdiff1d(each.lane.rows, removed)
            is_stored = contains(stored, old)
            self.old_live[source], self._old_lost[source] = old[is_stored], old[~is_stored]
        for rows in state.lost_rows:
            self._removed[self._since(rows)] = True
        self._present[self._since(stored)] = True
        for batch in found.batches:
            rows = rows_of(batch)
            sources = pc.index_in(batch.column("source"), pa.array(SOURCES)).to_numpy()
            self._source[self._since(rows)] = sources[rows >= self.base]

    def num_inserted(self, index: int) -> int:
        """Rows of a source since the snapshot."""
        return int(np.count_nonzero(self._source == index))

    def new_live(self, index: int) -> Int64:
        """Live rows of a source since the snapshot."""
        return self.base + np.flatnonzero(self._present & ~self._removed & (self._source == index))

    def lost(self) -> list[tuple[str | None, Int64]]:
        """Rows that should be live and are in no segment, by source."""
        missing = ~self._present & ~self._removed
        found: list[tuple[str | None, Int64]] = [(None, self.base + np.flatnonzero(missing & (self._source < 0)))]
        for index, source in enumerate(SOURCES):
            new = self.base + np.flatnonzero(missing & (self._source == index))
            found.append((source, np.concatenate([self._old_lost[source], new])))
        return [(source, rows) for source, rows in found if len(rows)]

    def _since(self, rows: Int64) -> Int64:
        """Places of the rows that came after the snapshot."""
        return rows[rows >= self.base] - self.base


def _restored_lane(
    settings: BufferSettings, state: LogState, fates: _Fates, facts: Sequence[RowFacts], source: str
) -> Lane:
    """The snapshot's rows as they were, then the new ones, then what the log says of both."""
    own = state.sources[source]
    old, new = fates.old_live[source], fates.new_live(SOURCES.index(source))
    old_facts, new_facts = _select(facts, old), _select(facts, new)
    kept = contains(old, own.lane.rows)
    priorities = None if own.lane.priorities is None else own.lane.priorities[kept]
    lane = Lane(settings)
    lane.restore(LaneSnapshot(old, own.lane.times_sampled[kept], priorities), old_facts)
    lane.append(new_facts)
    for rows in own.drawn:
        lane.count_draw(rows)
    for rows, values in own.priorities:
        lane.update_priorities(rows, values)
    # The log does not say what was largest when a row came: what nobody has judged yet is to be seen soon.
    lane.restart_priorities(np.setdiff1d(new, np.concatenate([NO_ROWS, *(rows for rows, _ in own.priorities)])))
    return lane


def _select(facts: Sequence[RowFacts], rows: Int64) -> RowFacts:
    """Of these rows (ascending), which are all there."""
    parts = []
    for each in facts:
        mask = contains(rows, each.row)
        if mask.any():
            parts.append(each.where(mask))
    return RowFacts(
        row=np.concatenate([NO_ROWS, *(part.row for part in parts)]),
        oldest_version=np.concatenate([np.empty(0, np.int32), *(part.oldest_version for part in parts)]),
        created_us=np.concatenate([NO_ROWS, *(part.created_us for part in parts)]),
        task=pa.concat_arrays([pa.array([], pa.string()), *(part.task for part in parts)]),
    )


def _remember_removed(known: KnownIds, folder: Path, state: LogState) -> None:
    """The ids of the rows removed last, from as many files of the log as it takes."""
    removed = state.removed_ids
    for path in reversed(list(log_files(folder).values())[:-1]):
        if sum(len(rows) for rows, _ in removed) >= REMEMBERED_ROWS:
            break
        events = [event for record in read_log_file(path) for event in decode_events(record)]
        older = [(each.rows, each.ids) for each in events if each.kind == "remove" and each.rows is not None]
        removed = [*older, *removed]
    # Copies, so that the files that were read are not kept in memory.
    rows = np.concatenate([NO_ROWS, *(rows for rows, _ in removed)])[-REMEMBERED_ROWS:]
    ids = pa.concat_arrays([pa.array([], pa.string()), *(ids for _, ids in removed)])[-REMEMBERED_ROWS:]
    is_readable = ids.is_valid().to_numpy(zero_copy_only=False)
    known.add(hash_ids(ids.drop_null()), rows[is_readable])
    for first in range(0, len(rows), _REMEMBERED_TOGETHER):
        part = slice(first, first + _REMEMBERED_TOGETHER)
        known.remove(ids[part], rows[part])


def _note_lost(shard: ShardState, fates: _Fates) -> None:
    events = []
    for source, rows in fates.lost():
        ids = pa.nulls(len(rows), pa.string())
        events.append(Event("remove", source=source, reason="quarantine", rows=rows, ids=ids))
        if source is None:
            shard.lost += len(rows)
        else:
            shard.tallies[source].removed["quarantine"] += len(rows)
    if events:
        shard.log.append(*events)
