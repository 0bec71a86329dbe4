"""A read-only view of a replay buffer on disk, from any process and without a lock, while its shards go on writing.

    RUN/buffer/shard-000/, shard-001/, ...    one folder per shard (see `buffer.store.segment_folder`)
    RUN/buffer/manifest.json                  a folder of the previous format (see `buffer.store.previous_format`)

A snapshot of a shard takes three steps: the manifest; the segments that it lists (mapped, checksums verified) with the
complete batches of the open one; the consumption log. A seal, an eviction, a compaction or a rotation between two steps
can only take files away that an older manifest lists, so the reader begins anew when the manifest has changed under it.
Rows come before the log, and the log is cut before the first event that speaks of a row inserted meanwhile: what a
snapshot says of each of its rows was true at the moment of its last event. An event that was there before the segments
were read is never cut, whatever it says: that its rows are in no segment is then a fact. The shards of a buffer are
read one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from buffer.reading.shard_snapshot import ShardSnapshot, live_rows, times_sampled
from buffer.service.shard import present_shards
from buffer.store.event_history import read_events
from buffer.store.manifest import CorruptSegmentError, Manifest
from buffer.store.previous_format import holds_previous_format, read_previous_shard
from buffer.store.sealed_segments import map_sealed
from buffer.store.segments import open_numbers, open_path, scan_open
from buffer.trajectory.schema import ROW, TokenContract, stored_schema
from buffer.trajectory.staleness import NO_VERSION, VersionRange

ATTEMPTS = 20
"""Snapshots are begun anew at most this often; each takes longer than the steps of the writer that disturb it."""


@dataclass(frozen=True)
class BufferSnapshot:
    """All shards. trajectories: stored rows with `shard`, `live` and `times_sampled`; events: the logs with `shard`."""

    contract: TokenContract
    newest_version: int
    trajectories: pa.Table
    events: pa.Table


def shard_folders(buffer: Path) -> dict[int, Path]:
    """The folders of the shards below the buffer folder of a run, by their number.

    Raises:
        ValueError: there is none.
    """
    folders = present_shards(buffer)
    if not folders:
        raise ValueError(
            f"{buffer} holds no replay buffer: the run has not begun to collect trajectories yet, or trains on expert "
            "data alone"
        )
    return {int(folder.name.rpartition("-")[2]): folder for folder in folders}


def read_buffer(buffer: Path) -> BufferSnapshot:
    """A snapshot of every shard below `buffer`, as two tables.

    Raises:
        ValueError: there is no shard, or its rows are of another version of this program.
        CorruptSegmentError: a file is damaged. TimeoutError: see `read_shard`.
    """
    if holds_previous_format(buffer):
        shards = {0: read_previous_shard(buffer)}
    else:
        shards = {index: read_shard(folder) for index, folder in shard_folders(buffer).items()}
    contracts = {shard.contract for shard in shards.values()}
    if len(contracts) > 1:
        raise ValueError(
            f"{buffer}: its shards hold trajectories of {len(contracts)} tokenizers, which fit no one table"
        )
    return BufferSnapshot(
        contract=contracts.pop(),
        newest_version=max(shard.newest_version for shard in shards.values()),
        trajectories=pa.concat_tables(_with_facts(shard, index) for index, shard in shards.items()),
        events=pa.concat_tables(_with_shard(shard.events, index) for index, shard in shards.items()),
    )


def read_shard(folder: Path) -> ShardSnapshot:
    """A snapshot of the shard in `folder`; takes no lock and changes nothing.

    Raises:
        ValueError: `folder` is no shard, or another version of this program wrote it.
        CorruptSegmentError: a file is damaged.
        TimeoutError: the shard replaced its files during each of `ATTEMPTS` readings.
    """
    manifest = _manifest(folder)
    named_before = _next_row_named(read_events(folder))
    for _ in range(ATTEMPTS):
        try:
            return _read(folder, manifest, named_before)
        except (CorruptSegmentError, FileNotFoundError):
            newer = _manifest(folder)
            if newer == manifest:
                raise
        manifest = newer
    raise TimeoutError(f"{folder} replaced its files during each of {ATTEMPTS} readings: try again")


def _manifest(folder: Path) -> Manifest:
    manifest = Manifest.read(folder)
    if manifest is None:
        raise ValueError(f"{folder} is no shard of a replay buffer: it has no manifest.json")
    return manifest


def _read(folder: Path, manifest: Manifest, named_before: int) -> ShardSnapshot:
    schema = stored_schema(manifest.contract)
    batches = [batch for entry in manifest.segments for batch in map_sealed(folder, entry, schema)]
    versions = [entry.newest_version for entry in manifest.segments]
    next_row = max(manifest.next_row, named_before)
    if opened := _open_rows(folder, manifest, schema):
        # One batch of many small ones: engines pay per batch.
        batches.append(pa.concat_batches(opened))
        versions.append(int(VersionRange.from_batch(batches[-1]).newest.max()))
        next_row = max(next_row, batches[-1].column(ROW)[-1].as_py() + 1)
    stored = pa.Table.from_batches(batches, schema=schema)
    events = _before(read_events(folder), next_row)
    rows = stored.column(ROW).to_numpy()
    if np.any(np.diff(rows) <= 0):
        raise CorruptSegmentError(f"{folder}: the row numbers of its segments do not ascend, so two files share rows")
    return ShardSnapshot(
        folder=folder,
        contract=manifest.contract,
        next_row=next_row,
        newest_version=max([NO_VERSION, *versions, *_logged_versions(events)]),
        stored=stored,
        live=live_rows(rows, events),
        times_sampled=times_sampled(rows, events),
        events=events,
    )


def _open_rows(folder: Path, manifest: Manifest, schema: pa.Schema) -> tuple[pa.RecordBatch, ...]:
    """Of all open segments, by row: when one is listed, those before it are full."""
    numbers = open_numbers(folder, manifest.open_segment)
    if numbers[:1] != [manifest.open_segment]:
        if not numbers and _manifest(folder) == manifest:
            return ()  # the folder is new, and nothing was inserted yet
        raise CorruptSegmentError(f"{open_path(folder, manifest.open_segment)} is gone")
    batches: list[pa.RecordBatch] = []
    for number in numbers:
        path = open_path(folder, number)
        scan = scan_open(path, schema)
        if scan.damaged:
            damage = scan.damaged[0]
            raise CorruptSegmentError(
                f"{path} is damaged from byte {damage.start} to byte {damage.end}: a run that resumes puts the batch "
                "into quarantine and goes on without it"
            )
        batches += scan.batches
    return tuple(batches)


def _before(events: pa.Table, next_row: int) -> pa.Table:
    """The log up to the first event that speaks of row `next_row` or a later one."""
    owners = pc.list_parent_indices(events.column("rows")).to_numpy()
    late_rows = owners[pc.list_flatten(events.column("rows")).to_numpy() >= next_row]
    counted = pc.struct_field(events.column("counters"), "next_row")
    late_counts = np.flatnonzero(pc.greater(counted, next_row).fill_null(False).to_numpy())
    return events.slice(0, min([events.num_rows, *late_rows[:1].tolist(), *late_counts[:1].tolist()]))


def _next_row_named(events: pa.Table) -> int:
    """The number after the highest row that the log speaks of."""
    highest = pc.max(pc.list_flatten(events.column("rows"))).as_py()
    counted = pc.max(pc.struct_field(events.column("counters"), "next_row")).as_py()
    return max(0 if highest is None else highest + 1, counted or 0)


def _logged_versions(events: pa.Table) -> list[int]:
    counted = pc.struct_field(events.column("counters"), "newest_version")
    newest = (pc.max(events.column("policy_version")).as_py(), pc.max(counted).as_py())
    return [version for version in newest if version is not None]


# Tables of all shards


def _with_facts(shard: ShardSnapshot, index: int) -> pa.Table:
    table = _with_shard(shard.stored, index)
    table = table.append_column(pa.field("live", pa.bool_(), nullable=False), pa.array(shard.live))
    return table.append_column(pa.field("times_sampled", pa.int32(), nullable=False), pa.array(shard.times_sampled))


def _with_shard(table: pa.Table, index: int) -> pa.Table:
    column = pa.array(np.full(table.num_rows, index, dtype=np.int32))
    return table.append_column(pa.field("shard", pa.int32(), nullable=False), column)
