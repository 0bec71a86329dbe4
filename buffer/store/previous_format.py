"""Reading a buffer folder of manifest format 1, which lies below the runs of its time as RUN/buffer/manifest.json.

    its rows        schema version 1 (see `buffer.store.upgrade`)
    what is live    follows from the manifest: rows from `live_from` on, without those that were dropped as stale, and
                    of these the newest `capacity` per source
    its log         draws and checkpoints only: rows that ceased to be live left no trace, so nothing can be audited

No run goes on in such a folder, since nobody could account for its rows; they can be read and queried.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from buffer.reading.shard_snapshot import ShardSnapshot, times_sampled
from buffer.store.events import EVENT_SCHEMA
from buffer.store.manifest import MANIFEST_NAME, CorruptSegmentError
from buffer.store.segments import OPEN_SUFFIX, open_path, scan_open, sealed_path
from buffer.store.upgrade import PREVIOUS_VERSION, schema_of_version, upgrade
from buffer.trajectory.schema import ROW, SOURCES, IdRanges, TokenContract, stored_schema
from buffer.trajectory.staleness import VersionRange, stale_rows

Bool = npt.NDArray[np.bool_]

_LOG_SCHEMA = pa.schema(
    [
        pa.field("event", pa.string(), nullable=False),  # draw | checkpoint
        pa.field("stage", pa.string(), nullable=False),
        pa.field("step", pa.int64(), nullable=False),
        pa.field("source", pa.string()),
        pa.field("policy_version", pa.int64()),
        pa.field("rows", pa.list_(pa.int64())),
    ],
    metadata={b"schema_version": b"1"},
)


class _ContractJson(TypedDict):
    vocab_size: int
    backspace_id: int
    eos_id: int
    tokenizer_hash: str
    ids_without_token: NotRequired[IdRanges]


class _EntryJson(TypedDict):
    number: int
    first_row: int


class _ManifestJson(TypedDict):
    contract: _ContractJson
    capacity: int
    open_segment: int
    next_row: int
    newest_version: int
    live_from: dict[str, int]
    stale_before_row: int
    stale_below: int
    segments: list[_EntryJson]


def holds_previous_format(buffer: Path) -> bool:
    """Whether the buffer folder of a run is of format 1: without shards, its files directly in it."""
    return (buffer / MANIFEST_NAME).is_file()


def read_previous_shard(folder: Path) -> ShardSnapshot:
    """All of a folder of format 1. `at` is null in its events.

    Raises:
        CorruptSegmentError: a file is missing or damaged.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest: _ManifestJson = json.loads(path.read_bytes())
        contract = TokenContract(**manifest["contract"])
        batches = _stored_batches(folder, manifest, schema_of_version(contract, PREVIOUS_VERSION))
        stored = pa.Table.from_batches(batches, schema=stored_schema(contract))
        rows = stored.column(ROW).to_numpy()
        events = _events(folder)
        return ShardSnapshot(
            folder=folder,
            contract=contract,
            next_row=int(rows[-1]) + 1 if len(rows) else manifest["next_row"],
            newest_version=manifest["newest_version"],
            stored=stored,
            live=_live(stored, manifest),
            times_sampled=times_sampled(rows, events),
            events=events,
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CorruptSegmentError(f"{path} is damaged ({error}): restore it from a copy") from None
    except (pa.ArrowException, FileNotFoundError) as error:
        raise CorruptSegmentError(f"{folder} holds a damaged file: {error}") from None


def _stored_batches(folder: Path, manifest: _ManifestJson, schema: pa.Schema) -> list[pa.RecordBatch]:
    batches: list[pa.RecordBatch] = []
    for entry in manifest["segments"]:
        file = pa.memory_map(str(sealed_path(folder, entry["number"])))
        batches += upgrade(list(pa.ipc.open_stream(file)), entry["first_row"])
    if (path := open_path(folder, manifest["open_segment"])).is_file():
        batches += upgrade(scan_open(path, schema).batches, manifest["next_row"])
    return batches


def _live(stored: pa.Table, manifest: _ManifestJson) -> Bool:
    live = np.zeros(stored.num_rows, dtype=np.bool_)
    if not stored.num_rows:
        return live
    rows = stored.column(ROW).to_numpy()
    oldest = np.concatenate([VersionRange.from_batch(batch).oldest for batch in stored.to_batches()])
    dead = stale_rows(oldest, manifest["stale_below"]) & (rows < manifest["stale_before_row"])
    for source in SOURCES:
        own = pc.equal(stored.column("source"), source).to_numpy()
        kept = np.flatnonzero(own & ~dead & (rows >= manifest["live_from"].get(source, 0)))
        live[kept[-manifest["capacity"] :]] = True
    return live


def _events(folder: Path) -> pa.Table:
    """Draws and checkpoints. A new file of this log repeats the draws that no checkpoint covered: they count once."""
    records: list[pa.RecordBatch] = []
    for path in sorted(folder.glob("consumption-*")):
        is_open = path.name.endswith(OPEN_SUFFIX)
        records += scan_open(path, _LOG_SCHEMA).batches if is_open else pa.ipc.open_stream(pa.memory_map(str(path)))
    log = pa.Table.from_batches(records, schema=_LOG_SCHEMA)
    key = ["event", "stage", "step", "source"]
    lines = log.select(key).append_column("line", pa.array(np.arange(log.num_rows)))
    first = lines.group_by(key).aggregate([("line", "min")]).column("line_min")
    log = log.take(np.sort(first.to_numpy()))
    columns = [
        log.column(field.name) if field.name in log.column_names else pa.nulls(log.num_rows, field.type)
        for field in EVENT_SCHEMA
    ]
    return pa.Table.from_arrays(columns, schema=pa.schema([field.with_nullable(True) for field in EVENT_SCHEMA]))
