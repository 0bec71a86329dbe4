"""A read-only view of a replay buffer on disk, from any process, while its shards go on writing.

    RUN/buffer/shard-000/, shard-001/, ...    one folder per shard (see `buffer.store.catalog`)

One SQLite transaction reads the catalog as it was at one moment; the segments that it lists are mapped and their
checksums verified. A shard deletes a segment only after the catalog has ceased to list it, so a file that is missing
means that the catalog has changed meanwhile, and the reader begins again. The shards of a buffer are read one after the
other.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from buffer.service.shard import present_shards
from buffer.store.catalog import (
    CATALOG_NAME,
    FACTS,
    BatchEntry,
    CorruptStoreError,
    EventEntry,
    read_batches,
    read_events,
    read_meta,
    read_segments,
    segment_path,
)
from buffer.trajectory.schema import ROW, TokenContract, stored_schema
from buffer.trajectory.staleness import NO_VERSION

Bool = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

ATTEMPTS = 20
"""Snapshots are begun again at most this often; each takes longer than the steps of the writer that disturb it."""

LOCK_TIMEOUT_S = 1.0
_PRIMARY_CODE = 0xFF  # of SQLite's results, without what only details it

EVENT_SCHEMA = pa.schema(
    [
        pa.field("seq", pa.int64(), nullable=False),
        pa.field("at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("event", pa.string(), nullable=False),
        pa.field("stage", pa.string()),
        pa.field("step", pa.int64()),
        pa.field("source", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("policy_version", pa.int64()),
        pa.field("whole", pa.int64()),
        pa.field("next_row", pa.int64(), nullable=False),
        pa.field("rows", pa.list_(pa.int64())),
        pa.field("ids", pa.list_(pa.string())),
        pa.field("priorities", pa.list_(pa.float32())),
    ]
)
"""The columns of `EventEntry` as readers get them. A removal has the ids of its rows, too, null where nobody knows
them.
"""


@dataclass(frozen=True)
class ShardSnapshot:
    """One shard at one moment.

    stored: all rows of its segments (`stored_schema`), n of them, numbers ascending. oldest_version: [n] as the catalog
    says. live: [n] whether a new sample may give the row; the others wait for their segment to be deleted, or belong to
    a sample that may be repeated. times_sampled: [n] samples of the row; a repeated sample counts once. next_row: the
    number of the next row to be inserted. events: in order (`EVENT_SCHEMA`). newest_version: newest policy version.
    """

    contract: TokenContract
    next_row: int
    newest_version: int
    stored: pa.Table
    oldest_version: Int32
    live: Bool
    times_sampled: Int32
    events: pa.Table


@dataclass(frozen=True)
class BufferSnapshot:
    """All shards. trajectories: stored rows with `shard`, `live` and `times_sampled`; events: all, with `shard`."""

    contract: TokenContract
    newest_version: int
    trajectories: pa.Table
    events: pa.Table


def shard_folders(buffer: Path) -> dict[int, Path]:
    """The folders of the shards below the buffer folder of a run, by their number; ValueError where there is none."""
    folders = present_shards(buffer)
    if not folders:
        raise ValueError(
            f"{buffer} holds no replay buffer: the run has not begun to collect trajectories yet, or trains on expert "
            "data alone"
        )
    return {int(folder.name.rpartition("-")[2]): folder for folder in folders}


def read_buffer(buffer: Path, image: Callable[[Path], bytes] | None = None) -> BufferSnapshot:
    """A snapshot of every shard below `buffer`, as two tables. Raises as `read_shard`, which `image` is for."""
    shards = {index: read_shard(folder, image) for index, folder in shard_folders(buffer).items()}
    contracts = {shard.contract for shard in shards.values()}
    if len(contracts) > 1:
        raise ValueError(
            f"{buffer}: its shards hold trajectories of {len(contracts)} tokenizers, which fit no one table"
        )
    return BufferSnapshot(
        contract=contracts.pop(),
        newest_version=max(shard.newest_version for shard in shards.values()),
        trajectories=pa.concat_tables(_trajectories(shard, index) for index, shard in shards.items()),
        events=pa.concat_tables(with_shard(shard.events, index) for index, shard in shards.items()),
    )


def read_shard(folder: Path, image: Callable[[Path], bytes] | None = None) -> ShardSnapshot:
    """A snapshot of the shard in `folder`; takes no lock and changes nothing.

    image: asks the shard in a folder for its catalog (`ReplayStore.catalog_image`) where it keeps the file to itself.

    Raises:
        ValueError: `folder` is no shard, or another version of this program wrote it.
        CorruptStoreError: a file is damaged.
        OSError: the catalog cannot be opened, e.g. because its shard keeps it to itself, and there is no `image`.
        TimeoutError: the shard replaced its files during each of `ATTEMPTS` readings.
    """
    missing: set[str] = set()
    for _ in range(ATTEMPTS):
        try:
            with _opened(folder, image) as catalog:
                if catalog is not None:
                    return _read(folder, catalog)
        except FileNotFoundError as error:
            if error.filename in missing:  # the catalog lists it still, so its shard did not delete it
                raise CorruptStoreError(f"{error.filename} is gone, and the catalog beside it lists it") from None
            missing.add(error.filename)
    raise TimeoutError(f"{folder} replaced its files during each of {ATTEMPTS} readings: try again")


def with_shard(table: pa.Table, index: int) -> pa.Table:
    """The table with a column `shard`."""
    column = pa.array(np.full(table.num_rows, index, dtype=np.int32))
    return table.append_column(pa.field("shard", pa.int32(), nullable=False), column)


@contextmanager
def _opened(folder: Path, image: Callable[[Path], bytes] | None) -> Iterator[sqlite3.Connection | None]:
    """The catalog in one transaction; None where a shard began to write while it was opened for reading alone.

    A catalog without a write-ahead log is in use by nobody. It is read as a file that cannot change, because SQLite
    would otherwise create a log, which a read-only folder does not allow.
    """
    path = folder / CATALOG_NAME
    log = path.with_name(f"{CATALOG_NAME}-wal")
    if not path.is_file():
        raise ValueError(f"{folder} is no shard of a replay buffer: it has no {CATALOG_NAME}")
    is_idle = not log.exists()
    uri = f"{path.resolve().as_uri()}?mode=ro{'&immutable=1' if is_idle else ''}"
    try:
        with closing(sqlite3.connect(uri, uri=True, isolation_level=None, timeout=LOCK_TIMEOUT_S)) as catalog:
            if not is_idle and image is not None and _is_held(catalog):
                with closing(sqlite3.connect(":memory:")) as copy:
                    copy.deserialize(image(folder))
                    yield copy
                return
            catalog.execute("begin")
            catalog.execute("select count(*) from meta")  # from here on SQLite keeps this state for the transaction
            yield None if is_idle and log.exists() else catalog
    except sqlite3.OperationalError as error:
        raise OSError(
            f"{path} cannot be read ({error}): on a shared file system a shard keeps its catalog to itself while the "
            "run goes on; ask it over Arrow Flight (buffer.flight.enabled), or read it when the run has ended"
        ) from None
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the second of names that an error of SQLite quotes
        raise CorruptStoreError(f"{path} is damaged ({error})") from None


def _is_held(catalog: sqlite3.Connection) -> bool:
    try:
        catalog.execute("select count(*) from meta")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & _PRIMARY_CODE == sqlite3.SQLITE_BUSY:
            return True
        raise
    return False


def _read(folder: Path, catalog: sqlite3.Connection) -> ShardSnapshot:
    path = folder / CATALOG_NAME
    # First of all, before the shard deletes one of them.
    contents = {entry.number: _mapped(segment_path(folder, entry.number)) for entry in read_segments(catalog, path)}
    meta = read_meta(catalog, path)
    metadata: dict[str, str] = json.loads(meta["contract"])
    contract = TokenContract.from_metadata({name.encode(): value.encode() for name, value in metadata.items()})
    batches, events = read_batches(catalog, path), list(read_events(catalog, path))
    schema = stored_schema(contract)
    stored = pa.Table.from_batches([_batch(folder, each, contents[each.segment], schema) for each in batches], schema)
    rows = np.concatenate([np.empty(0, np.int64), *(batch.row_numbers for batch in batches)])
    if np.any(np.diff(rows) <= 0):
        raise CorruptStoreError(f"{folder}: the row numbers of its batches do not ascend, so two of them share rows")
    sampled = _rows_of(events, "draw")
    sampled = sampled[np.isin(sampled, rows)]  # segments of the others are deleted
    versions = [
        *(batch.newest_version for batch in batches),
        *(event.version for event in events if event.kind != "stage" and event.version is not None),
    ]
    return ShardSnapshot(
        contract=contract,
        next_row=max(int(meta.get("next_row", "0")), int(rows[-1]) + 1 if len(rows) else 0),
        newest_version=max(versions, default=NO_VERSION),
        stored=stored,
        oldest_version=np.concatenate([np.empty(0, FACTS), *(batch.row_facts for batch in batches)])["oldest_version"],
        live=~np.isin(rows, _rows_of(events, "remove")),
        times_sampled=np.bincount(np.searchsorted(rows, sampled), minlength=len(rows)).astype(np.int32),
        events=_events_table(events, stored),
    )


def _mapped(path: Path) -> pa.Buffer:
    with path.open("rb") as file:
        return pa.py_buffer(mmap(file.fileno(), 0, access=ACCESS_READ))


def _batch(folder: Path, entry: BatchEntry, content: pa.Buffer, schema: pa.Schema) -> pa.RecordBatch:
    """The rows of a batch where they lie in the mapped segment."""
    message = content.slice(entry.offset, entry.length)
    if xxhash.xxh3_128_digest(message) != entry.message_checksum:
        raise CorruptStoreError(
            f"{segment_path(folder, entry.segment)} is damaged from byte {entry.offset} to byte "
            f"{entry.offset + entry.length}: a run that resumes puts the batch into quarantine and goes on without it"
        )
    return pa.ipc.read_record_batch(message, schema)


def _rows_of(events: Sequence[EventEntry], kind: str) -> Int64:
    """[n] row numbers that events of one kind name, in the order of the events."""
    return np.concatenate([np.empty(0, np.int64), *(event.row_numbers for event in events if event.kind == kind)])


def _events_table(events: Sequence[EventEntry], stored: pa.Table) -> pa.Table:
    """Events as one table (`EVENT_SCHEMA`)."""
    names = {"at": "at_us", "event": "kind", "policy_version": "version"}
    scalars = [
        pa.array([getattr(event, names.get(field.name, field.name)) for event in events], field.type)
        for field in list(EVENT_SCHEMA)[:-3]
    ]
    rows = _lists([event.rows for event in events], np.int64)
    ids = pa.array([_ids_of(event) for event in events], pa.list_(pa.string()))
    priorities = _lists([event.priorities for event in events], np.float32)
    kinds = scalars[EVENT_SCHEMA.get_field_index("event")]
    is_removal, is_deletion = pc.equal(kinds, "remove"), pc.equal(kinds, "delete")
    known_rows, known_ids = (
        pa.concat_arrays([*stored.column(name).chunks, pc.list_flatten(named.filter(is_deletion))])
        for name, named in ((ROW, rows), ("id", ids))
    )
    found = pa.ListArray.from_arrays(rows.offsets, known_ids.take(pc.index_in(rows.values, known_rows)))
    ids = pc.if_else(is_removal, found, ids)
    return pa.Table.from_arrays([*scalars, rows, ids, priorities], schema=EVENT_SCHEMA)


def _ids_of(event: EventEntry) -> list[str | None] | None:
    if event.ids is None:
        return [None] * len(event.row_numbers) if event.kind == "delete" else None
    ids: list[str | None] = json.loads(event.ids)
    return ids


def _lists(blobs: Sequence[bytes | None], kind: type[np.int64 | np.float32]) -> pa.ListArray:
    """A list column made without a Python object per element; a null in its offsets makes a null list."""
    size = np.dtype(kind).itemsize
    ends = np.cumsum([0, *(len(blob or b"") // size for blob in blobs)]).astype(np.int32)
    offsets = pa.array(ends, mask=np.array([*(blob is None for blob in blobs), False]))
    return pa.ListArray.from_arrays(offsets, pa.array(np.frombuffer(b"".join(blob or b"" for blob in blobs), kind)))


def _trajectories(shard: ShardSnapshot, index: int) -> pa.Table:
    table = with_shard(shard.stored, index)
    for name, values in (("live", pa.array(shard.live)), ("times_sampled", pa.array(shard.times_sampled))):
        table = table.append_column(pa.field(name, values.type, nullable=False), values)
    return table
