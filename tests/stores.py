"""Replay stores for tests: small ones, draws without ceremony, and folders as a crash leaves them."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pyarrow as pa

from buffer.settings import BufferSettings
from buffer.store.catalog import CATALOG_NAME, EventEntry, read_batches, read_events, segment_path
from buffer.store.store import ReplayStore
from buffer.trajectory.schema import stored_schema
from tests.trajectories import CONTRACT, fresh_key, ids_of

SMALL = 8_000
"""segment_bytes that a few inserts fill."""


def open_store(folder: Path, seed: int = 0, **changes: object) -> ReplayStore:
    """A store of 20 rows per source."""
    return ReplayStore(folder, CONTRACT, BufferSettings(**{"capacity": 20, "min_size": 1, **changes}), seed)


def draw(store: ReplayStore, count: int, version: int, source: str = "policy") -> pa.RecordBatch | None:
    """A new draw whose step is covered by a checkpoint at once, so that nothing stays pinned."""
    key = fresh_key(source)
    result = store.sample(key, count, version)
    if result is None:
        return None
    store.checkpointed(key.stage, key.step + 1)
    return result.batch


def live_ids(store: ReplayStore, source: str = "policy") -> set[str]:
    """All live rows, without a draw, which would change them."""
    rows = store._shard.table.live_rows(source)
    return set(ids_of(store._shard.gather.take(rows))) if len(rows) else set()


def events(folder: Path, kind: str | None = None) -> list[EventEntry]:
    """What the catalog of a shard says happened, also while its store is open."""
    path = folder / CATALOG_NAME
    with closing(sqlite3.connect(path)) as connection:
        return [event for event in read_events(connection, path) if kind in (None, event.kind)]


def stored_rows(folder: Path) -> list[int]:
    """Numbers of the rows in the segments that count, read from their bytes."""
    path = folder / CATALOG_NAME
    with closing(sqlite3.connect(path)) as connection:
        batches = read_batches(connection, path)
    rows: list[int] = []
    for entry in batches:
        content = pa.py_buffer(segment_path(folder, entry.segment).read_bytes())
        message = content.slice(entry.offset, entry.length)
        rows += pa.ipc.read_record_batch(message, stored_schema(CONTRACT)).column("row").to_pylist()
    return rows


def crash(folder: Path, to: Path) -> Path:
    """The folder as it would be found if the process died now."""

    return Path(shutil.copytree(folder, to))
