"""The catalog of a shard: one SQLite file that says where rows are stored and what happened to them.

    RUN/buffer/shard-000/
        catalog.db                SQLite, write-ahead log (`catalog.db-wal`, `catalog.db-shm` while it is open)
        segment-000001.arrows     Arrow IPC stream of stored rows (`stored_schema`); see `buffer.store.segments`
        quarantine/               damaged bytes, each with a text that says what they were

Row numbers count the insertions into the shard over all sources: 0, 1, 2, ...; no number is given twice. Blobs of row
numbers are little-endian int64, without a gap between two numbers. Each table has a column `checksum` over the other
columns of its row (`row_checksum`), because SQLite keeps none.

segments: the files that count. A file that is not listed is deleted when the shard is opened.
    number      in the name of the file
    size        bytes of a sealed file, which never changes again; null for the one that takes inserts: its committed
                bytes end with its last batch (with its header where it has none), and what follows (zeros, or a batch
                whose commit is under way) is not committed

batches: one row per stored Arrow message. An insert adds one; a compaction replaces those of the old segments.
    first_row, num_rows     smallest row number, and how many rows; batches do not overlap
    segment, offset, length     where the message lies
    newest_version          newest policy version in it, -1 where no row has one
    message_checksum        xxh3-128 of the message's bytes
    rows                    blob of its row numbers, ascending; null = first_row, first_row + 1, ...
    facts                   blob of `FACTS`, one per row, in the same order

events: what happened, in order. seq counts 1, 2, ... without a gap; at_us is in microseconds since the epoch; next_row
is the number of rows inserted before the event. An event never changes, and none is ever deleted.
    kind        says that                                           and fills
    draw        a training step was given rows                      stage, step, source, version, rows, whole
    checkpoint  the learner has a durable checkpoint                stage, step
    stage       rows of older weights are of an earlier stage       version (the first one that counts)
    version     a newer version was published                       version
    remove      rows ceased to be live                              source, reason, version, rows
    delete      the stored bytes of rows are gone                   source, rows, ids (null: they were unreadable)
    forget      a draw lost rows to damage: it is not repeated      stage, step, source
    reject      trajectories were refused on insert                 reason, ids
    priorities  the learner changed how likely rows are             source, rows, priorities
version is the newest policy version known (except in `stage`). rows keeps the order of a draw; in a `priorities` it is
in any order, and elsewhere it ascends. whole is the number of rows of the draw over all shards. ids is a JSON list: as
long as `rows` in a `delete`, with a null for a rejected trajectory without an id in a `reject`. priorities is a blob of
little-endian float32, one per row.

meta: JSON values: `contract` (the token contract as schema metadata), `next_row` (as of the last deletion; the next
row to be inserted has this number or the one after the last batch, whichever is larger), `format` (of this schema).

What follows from it:

    stored      rows of batches
    live        stored rows without those of `remove`
    inserted    rows below next_row; each is stored or in one `delete`, so per source: facts of batches + `delete`
    removed     each inserted row that is not live is in exactly one `remove`, whose reason is one of REASONS
    draws       a row was drawn once per `draw` that names it. A second `draw` of one key completes a part that an
                interruption left; rows of draws before a `forget` of their key do not count for the later ones
    pinned      rows of draws that no later `checkpoint` of their stage (with a larger step) or of another stage covers,
                and no `forget`: they are stored even when they are not live
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

CATALOG_NAME = "catalog.db"
FORMAT = 3

EventKind = Literal["draw", "checkpoint", "stage", "version", "remove", "delete", "forget", "reject", "priorities"]
RemovalReason = Literal["capacity", "age", "sampled", "stale", "stage", "quarantine"]

EVICTED = ("capacity", "age", "sampled")
"""Reasons to remove a row that could have been drawn: too many rows, too old, drawn `max_times_sampled` times."""

DROPPED = ("stale", "stage", "quarantine")
"""Reasons to remove a row that must not or cannot be drawn: `max_staleness`, of an earlier stage, damaged."""

REASONS = (*EVICTED, *DROPPED)
"""Why a row ceases to be live."""

FACTS = np.dtype(
    [
        ("hash", "<u8"),  # xxh3-64 of the id
        ("created_us", "<i8"),  # microseconds since the epoch
        ("oldest_version", "<i4"),  # of the policy, over the actions; -1 where there is none
        ("priority", "<f4"),  # when it was inserted
        ("source", "u1"),  # index into SOURCES
    ]
)
"""What the catalog holds of each stored row."""

TABLES = """
create table if not exists meta(key text primary key, value text not null, checksum blob not null) without rowid;
create table if not exists segments(number integer primary key, size integer, checksum blob not null);
create table if not exists batches(
    first_row integer primary key, num_rows integer not null, segment integer not null, offset integer not null,
    length integer not null, newest_version integer not null, message_checksum blob not null, rows blob,
    facts blob not null, checksum blob not null);
create table if not exists events(
    seq integer primary key, at_us integer not null, kind text not null, stage text, step integer, source text,
    reason text, version integer, whole integer, next_row integer not null, rows blob, ids text, priorities blob,
    checksum blob not null);
create view if not exists draws as
    select seq, at_us, stage, step, source, version, whole, rows from events where kind = 'draw';
create view if not exists removals as
    select seq, at_us, source, reason, version, rows from events where kind = 'remove';
create view if not exists rejections as
    select seq, at_us, reason, each.value as id from events, json_each(events.ids) as each where kind = 'reject';
"""


class CorruptStoreError(ValueError):
    """A file of a shard is not what was written; the message names it and says what to do."""


class SegmentEntry(NamedTuple):
    """A row of `segments`; see the module for the columns."""

    number: int
    size: int | None


class BatchEntry(NamedTuple):
    """A row of `batches`; see the module for the columns."""

    first_row: int
    num_rows: int
    segment: int
    offset: int
    length: int
    newest_version: int
    message_checksum: bytes
    rows: bytes | None
    facts: bytes

    @property
    def row_numbers(self) -> Int64:
        """[num_rows] ascending."""
        if self.rows is None:
            return np.arange(self.first_row, self.first_row + self.num_rows)
        return np.frombuffer(self.rows, np.int64)

    @property
    def row_facts(self) -> npt.NDArray[np.void]:
        """[num_rows] of `FACTS`."""
        return np.frombuffer(self.facts, FACTS)


class EventEntry(NamedTuple):
    """A row of `events`; see the module for the columns."""

    seq: int
    at_us: int
    kind: EventKind
    stage: str | None
    step: int | None
    source: str | None
    reason: str | None
    version: int | None
    whole: int | None
    next_row: int
    rows: bytes | None
    ids: str | None
    priorities: bytes | None

    @property
    def row_numbers(self) -> Int64:
        """[n] rows that the event names; none where it has no such column."""
        return np.frombuffer(self.rows or b"", np.int64)

    @classmethod
    def new(
        cls,
        kind: EventKind,
        stage: str | None = None,
        step: int | None = None,
        source: str | None = None,
        reason: str | None = None,
        version: int | None = None,
        whole: int | None = None,
        rows: Int64 | None = None,
        ids: Sequence[str | None] | None = None,
        priorities: Float32 | None = None,
    ) -> EventEntry:
        """An event that is to be written: its number, its time and `next_row` come with the commit."""
        return cls(
            0,
            0,
            kind,
            stage,
            step,
            source,
            reason,
            version,
            whole,
            0,
            None if rows is None else rows.astype("<i8").tobytes(),
            None if ids is None else json.dumps(ids),
            None if priorities is None else priorities.astype("<f4").tobytes(),
        )


def segment_path(folder: Path, number: int) -> Path:
    """Where segment `number` of the shard in `folder` lies, be it sealed or not."""
    return folder / f"segment-{number:06d}.arrows"


def row_checksum(values: tuple[object, ...]) -> bytes:
    """xxh3-64 of the columns of a row, in the order of the table, `checksum` left out."""
    blobs = [value for value in values if isinstance(value, bytes)]
    scalars = [len(value) if isinstance(value, bytes) else value for value in values]
    hashed = xxhash.xxh3_64(repr(scalars).encode())
    for blob in blobs:
        hashed.update(blob)
    return hashed.digest()


def read_segments(connection: sqlite3.Connection, path: Path) -> list[SegmentEntry]:
    """The files that count, by number.

    Raises:
        CorruptStoreError: a row of the catalog in `path` is damaged.
    """
    return [SegmentEntry(*row) for row in _checked(connection, path, "segments", "number")]


def read_batches(connection: sqlite3.Connection, path: Path) -> list[BatchEntry]:
    """Where rows are stored, by row number.

    Raises:
        CorruptStoreError: a row of the catalog in `path` is damaged.
    """
    return [BatchEntry(*row) for row in _checked(connection, path, "batches", "first_row")]


def read_events(connection: sqlite3.Connection, path: Path) -> Iterator[EventEntry]:
    """What happened, in order.

    Raises:
        CorruptStoreError: a row of the catalog in `path` is damaged or missing.
    """
    for number, row in enumerate(_checked(connection, path, "events", "seq"), start=1):
        event = EventEntry(*row)
        if event.seq != number:
            raise corrupt(path, f"event {number} is missing")
        yield event


def read_meta(connection: sqlite3.Connection, path: Path) -> dict[str, str]:
    """The JSON texts of `meta`.

    Raises:
        CorruptStoreError: a row of the catalog in `path` is damaged.
    """
    return dict(_checked(connection, path, "meta", "key"))


def corrupt(path: Path, what: str) -> CorruptStoreError:
    """The error of a catalog that cannot be used. what: is wrong with it."""
    return CorruptStoreError(
        f"{path} is damaged ({what}): restore it from a copy, or move {path.parent} away to begin with an empty "
        "buffer; without it nobody knows which trajectories were sampled and removed"
    )


def _checked(connection: sqlite3.Connection, path: Path, table: str, key: str) -> Iterator[tuple[Any, ...]]:
    """The rows of a table without their checksums, in the order of `key`."""
    for *values, checksum in connection.execute(f"select * from {table} order by {key}"):
        row = tuple(values)
        if row_checksum(row) != checksum:
            raise corrupt(path, f"the row of {table} with {key} {row[0]!r} does not agree with its checksum")
        yield row
