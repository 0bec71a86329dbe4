"""The replay store of one folder: durable inserts, capacity, strict staleness, seeded draws.

    insert: validate -> segment file (acknowledged) -> live rows -> evict beyond capacity -> seal a full
        segment
    draw:   drop stale rows (recorded in the manifest) -> sampler -> gather

Rows of each source are kept apart: capacity counts per source, and a draw names its source. After a crash,
the same rows are live as before it: sealed segments and stale drops stand in the manifest, inserts in the
open segment, and evictions since the last manifest follow from the capacity that it notes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from buffer.counters import DrawStatistics, InsertResult, SourceCounters, StoreStatus
from buffer.folder_lock import FolderLock
from buffer.live_rows import LiveRows, RowFacts
from buffer.manifest import CorruptSegmentError, Manifest, SegmentEntry
from buffer.row_table import RowTable
from buffer.samplers import Int64, make_sampler
from buffer.schema import SOURCES, TokenContract, trajectory_schema
from buffer.segments import (
    OPEN_SUFFIX,
    SEALED_SUFFIX,
    OpenSegment,
    map_sealed,
    open_path,
    recover_open_segment,
    sealed_path,
    write_sealed,
)
from buffer.settings import BufferSettings
from buffer.staleness import VersionRange, oldest_allowed, stale_rows, staleness
from buffer.validation import Rejection, validate

logger = logging.getLogger(__name__)


class _Lane:
    """Live rows and counters of one source."""

    def __init__(self) -> None:
        self.live = LiveRows()
        self.inserted = 0
        self.dropped_stale = 0
        self.live_from = 0
        self.drawn = 0
        self.draws = 0
        self.last_draw: DrawStatistics | None = None


class ReplayStore:
    """The trajectories of one folder. One process at a time, not thread-safe."""

    def __init__(
        self,
        folder: Path,
        contract: TokenContract,
        settings: BufferSettings,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open `folder`, creating it where absent, and restore its live rows. clock: seconds since the epoch.

        Raises:
            ValueError: another process has the folder open, or its rows follow another token contract.
            CorruptSegmentError: a file of the folder is damaged.
        """
        self._folder = folder
        self._contract = contract
        self._settings = settings
        self._clock = clock
        self._schema = trajectory_schema(contract)
        self._sampler = make_sampler(settings)
        self._table = RowTable()
        self._lanes = {source: _Lane() for source in SOURCES}
        self._ids: set[str] = set()
        self._rejected = 0
        self._next_row = 0
        self._open_segment: OpenSegment
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(folder)
        try:
            self._manifest = self._open_manifest()
            self._newest_version = self._manifest.newest_version
            self._first_version = 0
            self._cut_bytes = self._restore()
        except BaseException:
            self._lock.release()
            raise

    @property
    def newest_version(self) -> int:
        """Newest policy version seen in a row or at a draw; -1 before any."""
        return self._newest_version

    @property
    def next_row(self) -> int:
        """Rows inserted since the folder exists."""
        return self._next_row

    def num_live(self, source: str) -> int:
        """Live rows of `source`."""
        return len(self._lane(source).live)

    def num_inserted(self, source: str) -> int:
        """Rows of `source` inserted since the folder exists."""
        return self._lane(source).inserted

    def insert(self, batch: pa.RecordBatch) -> InsertResult:
        """Validate and store a batch; on return the accepted rows are in the segment file.

        An id that is live already is rejected, so that an insert may be repeated when its answer was lost.

        Raises:
            ValueError: the batch as a whole does not fit (see `buffer.validation.validate`).
            OSError: the disk refused. The open segment is as it was before, unless the rows are in it already
                and sealing it failed; then repeating the insert rejects them as present.
        """
        validated = validate(batch, self._contract)
        good, repeated = self._without_repeats(batch, validated.good, validated.rejections)
        rejections = tuple(sorted((*validated.rejections, *repeated), key=lambda rejection: rejection.row))
        self._rejected += len(rejections)
        if good.num_rows:
            self._register([self._open_segment.append(good)], on_heap=True)
            self._evict(self._settings.capacity)
            if self._open_segment.size_bytes >= self._settings.segment_bytes:
                self._seal()
            self._delete_dead_segments()
        return InsertResult(good.num_rows, rejections)

    def draw(
        self, count: int, policy_version: int, generator: np.random.Generator, source: str = "policy"
    ) -> pa.RecordBatch | None:
        """`count` distinct live rows of `source`, none staler than `max_staleness`.

        policy_version: newest published version as far as the caller knows. None while too few rows are live:
        fewer than `count`, or than `min_size` before the first draw. Stale rows are dropped for good first,
        whatever comes of the draw.

        Raises:
            ValueError: `count` is not in 1..capacity, or the source is unknown.
        """
        if not 1 <= count <= self._settings.capacity:
            raise ValueError(
                f"a draw of {count} trajectories can never be served: the buffer holds {self._settings.capacity} per "
                "source; lower the batch or raise buffer.capacity"
            )
        lane = self._lane(source)
        # A row of a newer version proves its publication, so staleness counts from the newest version known.
        self._newest_version = max(self._newest_version, policy_version)
        dropped = self._drop_stale()
        if dropped or self._newest_version > self._manifest.newest_version:
            self._write_manifest()  # before anything is drawn, so that it holds after a crash
        if dropped:
            self._delete_dead_segments()
        if len(lane.live) < max(count, 0 if lane.draws else self._settings.min_size):
            return None
        chosen = self._sampler.sample(len(lane.live), count, generator)
        lane.draws += 1
        lane.drawn += count
        lane.last_draw = self._statistics(lane.live, chosen)
        return self._table.take(lane.live.rows[chosen])

    def begin_stage(self, first_version: int) -> None:
        """From now on no policy row with an action older than `first_version` is drawn, nor one that still comes in."""
        self._first_version = first_version

    def status(self) -> StoreStatus:
        """Counters of now."""
        return StoreStatus(
            sources={
                source: SourceCounters(
                    inserted=lane.inserted,
                    live=len(lane.live),
                    evicted=lane.inserted - len(lane.live) - lane.dropped_stale,
                    dropped_stale=lane.dropped_stale,
                    drawn=lane.drawn,
                    last_draw=lane.last_draw,
                )
                for source, lane in self._lanes.items()
            },
            rejected=self._rejected,
            newest_version=self._newest_version,
            sealed_segments=len(self._manifest.segments),
            size_bytes=self._open_segment.size_bytes + sum(entry.size_bytes for entry in self._manifest.segments),
            cut_bytes=self._cut_bytes,
        )

    def close(self) -> None:
        """Make everything durable and let go of the folder; the store is of no use afterwards."""
        self._open_segment.close()
        self._write_manifest()
        self._lock.release()

    def _lane(self, source: str) -> _Lane:
        if source not in self._lanes:
            raise ValueError(f"source {source!r} is none of {', '.join(SOURCES)}")
        return self._lanes[source]

    # Inserting

    def _without_repeats(
        self, batch: pa.RecordBatch, good: pa.RecordBatch, rejections: Sequence[Rejection]
    ) -> tuple[pa.RecordBatch, list[Rejection]]:
        ids = good.column("id").to_pylist()
        if self._ids.isdisjoint(ids):
            return good, []
        refused = {rejection.row for rejection in rejections}
        sent_rows = [row for row in range(batch.num_rows) if row not in refused]
        repeated = [
            Rejection(row, id_, "id is in the buffer already")
            for row, id_ in zip(sent_rows, ids, strict=True)
            if id_ in self._ids
        ]
        new = np.array([id_ not in self._ids for id_ in ids])
        return good.filter(pa.array(new)), repeated

    def _register(self, batches: Sequence[pa.RecordBatch], on_heap: bool) -> None:
        """Take stored rows into memory, as live rows for now."""
        for batch in batches:
            facts = RowFacts.from_batch(batch, self._next_row)
            self._newest_version = max(self._newest_version, int(VersionRange.from_batch(batch).newest.max()))
            for source, lane in self._lanes.items():
                own = facts.where(pc.equal(batch.column("source"), source).to_numpy(zero_copy_only=False))
                lane.inserted += len(own.records)
                lane.live.append(own)
                self._ids.update(own.records["id"].tolist())
            self._table.append(self._next_row, [batch], on_heap)
            self._next_row += batch.num_rows

    # Removing

    def _evict(self, capacity: int) -> None:
        for lane in self._lanes.values():
            excess = len(lane.live) - capacity
            if excess > 0:
                lane.live_from = int(lane.live.rows[excess - 1]) + 1
                self._ids.difference_update(lane.live.evict_oldest(excess))

    def _drop_stale(self) -> bool:
        """Drop rows beyond `max_staleness` or of another stage; True if there were any."""
        allowed = oldest_allowed(self._newest_version, self._settings.max_staleness, self._first_version)
        dropped = False
        for lane in self._lanes.values():
            stale = stale_rows(lane.live.oldest_versions, allowed)
            if stale.any():
                self._ids.difference_update(lane.live.drop(stale))
                lane.dropped_stale += int(stale.sum())
                dropped = True
        if dropped:
            self._manifest = replace(
                self._manifest,
                stale_before_row=self._next_row,
                stale_below=allowed,
            )
        return dropped

    def _delete_dead_segments(self) -> None:
        """Delete sealed segments without a live row, manifest first."""
        entries = self._manifest.segments
        if not entries:
            return
        first = np.array([entry.first_row for entry in entries])
        end = first + np.array([entry.num_rows for entry in entries])
        num_live = sum(
            np.searchsorted(lane.live.rows, end) - np.searchsorted(lane.live.rows, first)
            for lane in self._lanes.values()
        )
        dead = [entry for entry, count in zip(entries, num_live.tolist(), strict=True) if count == 0]
        if not dead:
            return
        self._manifest = replace(self._manifest, segments=tuple(entry for entry in entries if entry not in dead))
        self._write_manifest()
        for entry in dead:
            self._table.remove(entry.first_row, entry.first_row + entry.num_rows)
            sealed_path(self._folder, entry.number).unlink()

    # Sealing and opening

    def _seal(self) -> None:
        """Turn the open segment into a sealed one: sealed file, then manifest, then the open file goes."""
        manifest = self._manifest
        number, first_row = manifest.open_segment, manifest.next_row
        batches = self._table.batches(first_row)
        sealed = write_sealed(sealed_path(self._folder, number), batches, self._schema)
        ranges = [VersionRange.from_batch(batch) for batch in batches]
        entry = SegmentEntry(
            number=number,
            first_row=first_row,
            num_rows=self._next_row - first_row,
            size_bytes=sealed.size_bytes,
            checksum=sealed.checksum,
            oldest_version=min(int(versions.oldest.min()) for versions in ranges),
            newest_version=max(int(versions.newest.max()) for versions in ranges),
        )
        mapped = map_sealed(self._folder, entry, self._schema)
        self._manifest = replace(
            manifest,
            open_segment=number + 1,
            next_row=self._next_row,
            inserted={source: lane.inserted for source, lane in self._lanes.items()},
            segments=(*manifest.segments, entry),
        )
        self._write_manifest()
        self._table.remove(first_row, self._next_row)
        self._table.append(first_row, mapped, on_heap=False)
        self._open_segment.close()
        self._open_segment.path.unlink()
        self._open_segment = self._new_open_segment()

    def _write_manifest(self) -> None:
        self._manifest = replace(
            self._manifest,
            capacity=self._settings.capacity,
            newest_version=self._newest_version,
            live_from={source: lane.live_from for source, lane in self._lanes.items()},
            dropped={source: lane.dropped_stale for source, lane in self._lanes.items()},
        )
        self._manifest.write(self._folder)

    def _new_open_segment(self) -> OpenSegment:
        path = open_path(self._folder, self._manifest.open_segment)
        return OpenSegment(path, self._schema, self._settings.fsync == "batch")

    def _open_manifest(self) -> Manifest:
        manifest = Manifest.read(self._folder)
        if manifest is None:
            if segments := [*self._folder.glob(f"*{SEALED_SUFFIX}"), *self._folder.glob(f"*{OPEN_SUFFIX}")]:
                raise CorruptSegmentError(
                    f"{self._folder} holds {segments[0].name} but no manifest.json: restore it from a copy, or move "
                    "the folder away to begin with an empty buffer"
                )
            manifest = Manifest(self._contract, self._settings.capacity)
            manifest.write(self._folder)
        if manifest.contract != self._contract:
            raise ValueError(
                f"{self._folder} holds trajectories of another tokenizer ({manifest.contract}, this run has "
                f"{self._contract}): use another run folder"
            )
        return manifest

    def _restore(self) -> int:
        """Fill memory from the files that count and delete the others; gives the torn bytes that were cut off."""
        manifest = self._manifest
        for source, lane in self._lanes.items():
            lane.live_from = manifest.live_from.get(source, 0)
            lane.dropped_stale = manifest.dropped.get(source, 0)
        self._delete_leftovers()
        for entry in manifest.segments:
            batches = map_sealed(self._folder, entry, self._schema)
            self._next_row = entry.first_row
            self._register(batches, on_heap=False)
        # Counters of sealed rows stand in the manifest, since segments that are gone count too.
        self._next_row = manifest.next_row
        for source, lane in self._lanes.items():
            lane.inserted = manifest.inserted.get(source, 0)
        path = open_path(self._folder, manifest.open_segment)
        cut_bytes = 0
        if path.exists():
            recovered = recover_open_segment(path, self._schema)
            if recovered.batches:
                self._register([pa.concat_batches(recovered.batches)], on_heap=True)
            if cut_bytes := recovered.cut_bytes:
                logger.warning("%s: cut %d bytes of an unfinished insert off its end", path, cut_bytes)
        self._remove_dead_rows()
        self._open_segment = self._new_open_segment()
        # The capacity may have changed: note what it is from now on before anything is evicted by it.
        self._write_manifest()
        self._delete_dead_segments()
        return cut_bytes

    def _remove_dead_rows(self) -> None:
        """Take out again what was dropped or evicted before the folder was closed; count nothing twice."""
        manifest = self._manifest
        for lane in self._lanes.values():
            rows, oldest = lane.live.rows, lane.live.oldest_versions
            stale = (rows < manifest.stale_before_row) & (oldest >= 0) & (oldest < manifest.stale_below)
            lane.live.drop(stale | (rows < lane.live_from))
        self._evict(manifest.capacity)
        self._evict(self._settings.capacity)
        self._ids = {id_ for lane in self._lanes.values() for id_ in lane.live.ids}

    def _delete_leftovers(self) -> None:
        """Delete what a crash between two steps of sealing or deleting left behind."""
        kept = {sealed_path(self._folder, entry.number) for entry in self._manifest.segments}
        kept.add(open_path(self._folder, self._manifest.open_segment))
        for path in self._folder.glob("segment-*"):
            if path not in kept:
                path.unlink()

    def _statistics(self, live: LiveRows, chosen: Int64) -> DrawStatistics:
        behind = staleness(self._newest_version, live.oldest_versions[chosen])
        ages_s = np.maximum(self._clock() - live.created_us[chosen] / 1e6, 0.0)
        return DrawStatistics(float(behind.mean()), int(behind.max()), float(ages_s.mean()), float(ages_s.max()))
