"""The replay store of one folder: durable inserts, capacity, strict staleness, draws that can be repeated.

    insert: validate -> segment file (acknowledged) -> live rows -> evict beyond capacity -> seal a full
        segment
    draw:   known to the consumption log? the same rows again. Else: drop stale rows (recorded in the
        manifest) -> sampler -> consumption log -> gather

Rows of each source are kept apart: capacity counts per source, and a draw names its source. After a crash,
the same rows are live as before it: sealed segments and stale drops stand in the manifest, inserts in the
open segment, and evictions since the last manifest follow from the capacity that it notes. Rows that are no
longer live are kept as long as the log pins them.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from buffer.consumption_log import ConsumptionLog, DrawKey, LoggedDraw
from buffer.counters import DrawResult, DrawStatistics, InsertResult, StoreStatus
from buffer.folder_lock import FolderLock
from buffer.lanes import Lane
from buffer.live_rows import RowFacts
from buffer.row_table import RowTable
from buffer.samplers import Int64, make_sampler
from buffer.schema import SOURCES, TokenContract, trajectory_schema, with_rows, without_rows
from buffer.segment_folder import delete_leftovers, open_manifest, seal_rows
from buffer.segments import OpenSegment, map_sealed, open_path, recover_open_segment, sealed_path
from buffer.settings import BufferSettings
from buffer.staleness import VersionRange, oldest_allowed, staleness
from buffer.validation import Rejection, validate

logger = logging.getLogger(__name__)


class ReplayStore:
    """The trajectories of one folder. One process at a time, not thread-safe."""

    def __init__(
        self,
        folder: Path,
        contract: TokenContract,
        settings: BufferSettings,
        seed: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open `folder`, creating it where absent, and restore its live rows.

        seed: of the draws. clock: seconds since the epoch.

        Raises:
            ValueError: another process has the folder open, or its rows follow another token contract.
            CorruptSegmentError: a file of the folder is damaged.
        """
        self._folder = folder
        self._contract = contract
        self._settings = settings
        self._seed = seed
        self._clock = clock
        self._schema = trajectory_schema(contract)
        self._sampler = make_sampler(settings)
        self._table = RowTable()
        self._lanes = {source: Lane() for source in SOURCES}
        self._ids: set[str] = set()
        self._rejected = 0
        self._next_row = 0
        self._open_segment: OpenSegment
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(folder)
        try:
            self._manifest = open_manifest(folder, contract, settings.capacity)
            self._log = ConsumptionLog(folder, settings.fsync == "batch")
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

    def draw(self, key: DrawKey, count: int, policy_version: int) -> DrawResult | None:
        """The rows that the draw `key` was given before, else `count` distinct live rows of its source, none staler
        than `max_staleness`. Same seed, key and contents: same rows.

        policy_version: newest published version as far as the caller knows. None while too few rows are live:
        fewer than `count`, or than `min_size` before the first draw. For a new draw stale rows are dropped for good
        first, whatever comes of it.

        Raises:
            ValueError: `count` is not in 1..capacity, the source is unknown, or the draw had another count before.
            OSError: the disk refused; nothing was drawn.
        """
        if not 1 <= count <= self._settings.capacity:
            raise ValueError(
                f"a draw of {count} trajectories can never be served: the buffer holds {self._settings.capacity} per "
                "source; lower the batch or raise buffer.capacity"
            )
        lane = self._lane(key.source)
        if (logged := self._log.find(key)) is not None:
            return self._repeat(logged, count)
        # A row of a newer version proves its publication, so staleness counts from the newest version known.
        self._newest_version = max(self._newest_version, policy_version)
        dropped = self._drop_stale()
        if dropped or self._newest_version > self._manifest.newest_version:
            self._write_manifest()  # before anything is drawn, so that it holds after a crash
        if dropped:
            self._delete_dead_segments()
        if len(lane.live) < max(count, 0 if lane.draws else self._settings.min_size):
            return None
        rows = lane.live.rows[self._sampler.sample(len(lane.live), count, self._generator(key))]
        self._log.append(LoggedDraw(key, self._newest_version, rows))
        lane.draws += 1
        lane.drawn += count
        return self._gather(rows, self._newest_version, lane, repeated=False)

    def has_drawn(self, key: DrawKey) -> bool:
        """Whether the draw is one that would be repeated."""
        return self._log.find(key) is not None

    def checkpointed(self, stage: str, step: int) -> None:
        """The learner has a durable checkpoint of `stage` after `step` steps: no draw before it will be repeated.

        Raises:
            OSError: the disk refused.
        """
        self._log.checkpointed(stage, step)
        self._delete_dead_segments()

    def begin_stage(self, first_version: int) -> None:
        """From now on no policy row with an action older than `first_version` is drawn, nor one that still comes in."""
        self._first_version = first_version

    def status(self) -> StoreStatus:
        """Counters of now."""
        return StoreStatus(
            sources={source: lane.counters() for source, lane in self._lanes.items()},
            rejected=self._rejected,
            newest_version=self._newest_version,
            sealed_segments=len(self._manifest.segments),
            size_bytes=self._open_segment.size_bytes + sum(entry.size_bytes for entry in self._manifest.segments),
            cut_bytes=self._cut_bytes,
        )

    def close(self) -> None:
        """Make everything durable and let go of the folder; the store is of no use afterwards."""
        self._open_segment.close()
        self._log.close()
        self._write_manifest()
        self._lock.release()

    def _lane(self, source: str) -> Lane:
        if source not in self._lanes:
            raise ValueError(f"source {source!r} is none of {', '.join(SOURCES)}")
        return self._lanes[source]

    # Drawing

    def _repeat(self, draw: LoggedDraw, count: int) -> DrawResult:
        if len(draw.rows) != count:
            raise ValueError(
                f"step {draw.key.step} of stage {draw.key.stage!r} drew {len(draw.rows)} {draw.key.source} "
                f"trajectories before it was interrupted, and asks for {count} now: resume with the batch sizes that "
                "the run began with"
            )
        lane = self._lane(draw.key.source)
        lane.replayed += count
        return self._gather(draw.rows, draw.policy_version, lane, repeated=True)

    def _gather(self, rows: Int64, policy_version: int, lane: Lane, repeated: bool) -> DrawResult:
        batch = without_rows(self._table.take(rows))
        lane.last_draw = self._statistics(batch, policy_version)
        return DrawResult(batch, policy_version, repeated)

    def _generator(self, key: DrawKey) -> np.random.Generator:
        """A draw's own random numbers: they depend on no other draw, so none has to be repeated for this one."""
        return np.random.default_rng((self._seed, zlib.crc32(key.stage.encode()), key.step, SOURCES.index(key.source)))

    def _statistics(self, batch: pa.RecordBatch, policy_version: int) -> DrawStatistics:
        behind = staleness(policy_version, VersionRange.from_batch(batch).oldest)
        created_us = batch.column("created_at").cast(pa.int64()).to_numpy()
        ages_s = np.maximum(self._clock() - created_us / 1e6, 0.0)
        return DrawStatistics(float(behind.mean()), int(behind.max()), float(ages_s.mean()), float(ages_s.max()))

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
            self._table.append([with_rows(batch, np.arange(self._next_row, self._next_row + batch.num_rows))], on_heap)
            self._next_row += batch.num_rows

    # Removing

    def _evict(self, capacity: int) -> None:
        for lane in self._lanes.values():
            self._ids.difference_update(lane.evict_beyond(capacity))

    def _drop_stale(self) -> bool:
        """Drop rows beyond `max_staleness` or of another stage; True if there were any."""
        allowed = oldest_allowed(self._newest_version, self._settings.max_staleness, self._first_version)
        dropped = [id_ for lane in self._lanes.values() for id_ in lane.drop_stale(allowed)]
        if not dropped:
            return False
        self._ids.difference_update(dropped)
        self._manifest = replace(self._manifest, stale_before_row=self._next_row, stale_below=allowed)
        return True

    def _delete_dead_segments(self) -> None:
        """Delete sealed segments in which no row is live or pinned, manifest first."""
        entries = self._manifest.segments
        if not entries:
            return
        first = np.array([entry.first_row for entry in entries])
        end = first + np.array([entry.num_rows for entry in entries])
        kept_rows = [*(lane.live.rows for lane in self._lanes.values()), self._log.pinned_rows]
        num_kept = sum(np.searchsorted(rows, end) - np.searchsorted(rows, first) for rows in kept_rows)
        dead = [entry for entry, count in zip(entries, num_kept.tolist(), strict=True) if count == 0]
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
        first_row = manifest.next_row
        batches = [without_rows(batch) for batch in self._table.batches(first_row)]
        entry = seal_rows(self._folder, manifest.open_segment, first_row, batches)
        mapped = map_sealed(self._folder, entry, self._schema)
        self._manifest = replace(
            manifest,
            open_segment=entry.number + 1,
            next_row=self._next_row,
            inserted={source: lane.inserted for source, lane in self._lanes.items()},
            segments=(*manifest.segments, entry),
        )
        self._write_manifest()
        self._table.remove(first_row, self._next_row)
        for batch in mapped:
            self._table.append([with_rows(batch, np.arange(first_row, first_row + batch.num_rows))], on_heap=False)
            first_row += batch.num_rows
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

    def _restore(self) -> int:
        """Fill memory from the files that count and delete the others; gives the torn bytes that were cut off."""
        manifest = self._manifest
        for source, lane in self._lanes.items():
            lane.live_from = manifest.live_from.get(source, 0)
            lane.dropped_stale = manifest.dropped.get(source, 0)
        delete_leftovers(self._folder, manifest)
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
        self._log.forget_unless(self._table.holds)
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
            lane.remove_dead(manifest.stale_before_row, manifest.stale_below)
        self._evict(manifest.capacity)
        self._evict(self._settings.capacity)
        self._ids = {id_ for lane in self._lanes.values() for id_ in lane.live.ids}
