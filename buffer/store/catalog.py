"""The catalog of a shard: one SQLite file with the place of each row and the events of the shard, in order.
docs/buffer.md describes its tables.

`CatalogWriter` commits related changes in one transaction. SQLite readers share memory with the writer, so they must be
on its host. On a file system that several hosts share, the writer opens the file exclusively
(`locking_mode=EXCLUSIVE`), and readers get `CatalogWriter.image`.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from buffer.disk import is_shared, sync_later
from buffer.trajectory.schema import TokenContract
from buffer.trajectory.staleness import Int64

CATALOG_NAME = "catalog.db"
LAYOUTS = ("segment-*", "consumption-*", "manifest.json")
"""Files of shards, also of earlier versions of this program; without a catalog their rows cannot be used."""
FORMAT = 4

EventKind = Literal["draw", "checkpoint", "stage", "version", "remove", "delete", "forget", "reject", "priorities"]
RemovalReason = Literal["capacity", "age", "sampled", "stale", "stage", "quarantine"]

EVICTED = ("capacity", "age", "sampled")
"""Reasons to remove a row that could have been sampled: too many rows, too old, sampled `max_times_sampled` times."""

REASONS = (*EVICTED, "stale", "stage", "quarantine")
"""Why a row ceases to be live. Rows dropped for the last three must not be sampled: `max_staleness`, an earlier stage,
damage."""

WAL_BYTES = 2**20
"""The write-ahead log is cut to this size when SQLite has copied it into the database (every 1,000 pages)."""

_REFUSED = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_BUSY: errno.EBUSY,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
    sqlite3.SQLITE_PERM: errno.EACCES,
}
"""SQLite's error codes that do not mean a damaged file."""

_JOURNAL_MODE = slice(18, 20)
"""Bytes of a database's header: 2 with a write-ahead log, which a database in memory cannot have, else 1."""

FACTS = np.dtype(
    [
        ("hash", "<u8"),  # xxh3-64 of the id
        ("created_us", "<i8"),  # microseconds since the epoch
        ("oldest_version", "<i4"),  # of the policy, over the actions; -1 where there is none
        ("priority", "<f4"),  # when it was inserted
        ("source", "u1"),  # index into SOURCES
    ]
)
"""The catalog's record of each stored row."""

TABLES = """
create table if not exists meta(key text primary key, value text not null, checksum blob not null) without rowid;
create table if not exists segments(number integer primary key, size integer, checksum blob not null);
create table if not exists batches(
    first_row integer primary key, num_rows integer not null, segment integer not null, offset integer not null,
    length integer not null, newest_version integer not null, message_checksum blob not null, rows blob,
    facts blob not null, checksum blob not null);
create table if not exists events(
    kind text not null, stage text, step integer, source text, reason text, version integer, whole integer, rows blob,
    ids text, priorities blob, seq integer primary key, at_us integer not null, next_row integer not null,
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
    """A row of `segments`; see docs/buffer.md for the columns."""

    number: int
    size: int | None


class BatchEntry(NamedTuple):
    """A row of `batches`; see docs/buffer.md for the columns."""

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
    """A row of `events`; see docs/buffer.md for the columns. The last three come with the commit."""

    kind: EventKind
    stage: str | None = None
    step: int | None = None
    source: str | None = None
    reason: str | None = None
    version: int | None = None
    whole: int | None = None
    rows: bytes | None = None
    ids: str | None = None
    priorities: bytes | None = None
    seq: int = 0
    at_us: int = 0
    next_row: int = 0

    @property
    def row_numbers(self) -> Int64:
        """[n] rows that the event names; none where it has no such column."""
        return np.frombuffer(self.rows or b"", np.int64)


class Deletion(NamedTuple):
    """Batches (by first row) and segments (by number) to delete from the catalog."""

    batches: Sequence[int]
    segments: Sequence[int] = ()


Change = BatchEntry | SegmentEntry | EventEntry | Deletion
_Statement = tuple[str, tuple[object, ...]]


def segment_path(folder: Path, number: int) -> Path:
    """Path of segment `number` of the shard in `folder`, sealed or not."""
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
    """The segments, by number. A damaged row is a `CorruptStoreError` here and below."""
    return [SegmentEntry(*row) for row in _checked(connection, path, "segments", "number")]


def read_batches(connection: sqlite3.Connection, path: Path) -> list[BatchEntry]:
    """The stored batches, by row number."""
    return [BatchEntry(*row) for row in _checked(connection, path, "batches", "first_row")]


def read_events(connection: sqlite3.Connection, path: Path) -> Iterator[EventEntry]:
    """The events, in order; a missing event is a `CorruptStoreError`, too."""
    for number, row in enumerate(_checked(connection, path, "events", "seq"), start=1):
        event = EventEntry(*row)
        if event.seq != number:
            raise corrupt(path, f"event {number} is missing")
        yield event


def read_meta(connection: sqlite3.Connection, path: Path) -> dict[str, str]:
    """The JSON texts of `meta`."""
    return dict(_checked(connection, path, "meta", "key"))


def corrupt(path: Path, what: str) -> CorruptStoreError:
    """The error for a catalog that cannot be used. what: the damage."""
    return CorruptStoreError(
        f"{path} is damaged ({what}): restore it from a copy, or move {path.parent} away to begin with an empty "
        "buffer; only the catalog says which trajectories were sampled and removed"
    )


def _checked(connection: sqlite3.Connection, path: Path, table: str, key: str) -> Iterator[tuple[Any, ...]]:
    for name, *values, checksum in connection.execute(f"select {key}, * from {table} order by {key}"):
        row = tuple(values)
        if row_checksum(row) != checksum:
            raise corrupt(path, f"the row of {table} with {key} {name!r} does not agree with its checksum")
        yield row


class CatalogWriter:
    """The catalog of a shard whose folder is locked. Not thread-safe.

    In SQLite's write-ahead mode a commit always survives the death of the process. It survives a loss of power after
    a sync of it (`synchronous=FULL`) or of a later commit. An OSError of any method means that the disk refused; then
    nothing has changed.
    """

    def __init__(self, folder: Path, contract: TokenContract, sync: bool, clock: Callable[[], float]) -> None:
        """Open the catalog, or create it. sync: whether durable commits survive a loss of power. clock: seconds since
        the epoch.

        Raises:
            CorruptStoreError: it is damaged, or missing beside segments.
            ValueError: the rows follow another token contract, or another version of this program wrote them.
        """
        self.path = folder / CATALOG_NAME
        self.next_row = 0
        """Number of the next row to be inserted."""
        self._sync = sync
        self._clock = clock
        self._num_events = 0
        self._is_full_sync = False  # of the next commit
        self._lock = Lock()  # held while a transaction is under way
        if not self.path.exists() and (found := sorted(path for each in LAYOUTS for path in folder.glob(each))):
            raise CorruptStoreError(
                f"{folder} holds {found[0].name} but no {CATALOG_NAME}: an earlier version of this program wrote "
                "it, or it was lost: restore it from a copy, or use another run folder"
            )
        self._connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        try:
            with self._reading():
                if is_shared(folder):
                    self._connection.execute("pragma locking_mode=exclusive")
                for pragma in ("journal_mode=wal", f"journal_size_limit={WAL_BYTES}", "synchronous=normal"):
                    self._connection.execute(f"pragma {pragma}")
                self._check(contract)
        except BaseException:
            self._connection.close()
            raise

    def read(self) -> tuple[list[SegmentEntry], list[BatchEntry]]:
        """Everything but the events. A damaged row is a `CorruptStoreError`, as in `events`."""
        with self._reading():
            meta = read_meta(self._connection, self.path)
            segments = read_segments(self._connection, self.path)
            batches = read_batches(self._connection, self.path)
        end_row = int(batches[-1].row_numbers[-1]) + 1 if batches else 0
        self.next_row = max(json.loads(meta.get("next_row", "0")), end_row)
        return segments, batches

    def events(self) -> Iterator[EventEntry]:
        """The events, in order."""
        with self._reading():
            for event in read_events(self._connection, self.path):
                self._num_events = event.seq
                yield event

    def commit(self, changes: Sequence[Change], durable: bool = True) -> None:
        """Write these changes, all or none. durable: whether they survive a loss of power (where the shard asks for
        that at all), not only the death of the process. Changes of segments always do: a file is deleted after them."""
        num_events, next_row, at_us = self._num_events, self.next_row, int(self._clock() * 1e6)
        statements: list[_Statement] = []
        for change in changes:
            match change:
                case EventEntry():
                    num_events += 1
                    entry = change._replace(seq=num_events, at_us=at_us, next_row=self.next_row)
                    statements.append(_insert("events", entry))
                case BatchEntry():
                    statements.append(_insert("batches", change))
                    next_row = max(next_row, change.first_row + change.num_rows)
                case SegmentEntry():
                    statements.append(_insert("segments", change))
                case Deletion():
                    statements.append(_insert("meta", ("next_row", json.dumps(self.next_row))))
                    statements += [("delete from batches where first_row = ?", (row,)) for row in change.batches]
                    statements += [("delete from segments where number = ?", (number,)) for number in change.segments]
        files_change = any(isinstance(change, Deletion | SegmentEntry) for change in changes)
        self._write(statements, full_sync=files_change or (durable and self._sync))
        self._num_events, self.next_row = num_events, next_row

    def prepare_sync(self) -> Callable[[], None]:
        """A function that makes every commit until now durable; it may run in any thread, even after `close`."""
        return sync_later(os.open(f"{self.path}-wal", os.O_RDONLY))

    def image(self) -> bytes:
        """A copy of the current catalog as a database, for `sqlite3.Connection.deserialize` or as a file; any thread
        may call this."""
        with self._lock, self._reading():
            content = bytearray(self._connection.serialize())
        content[_JOURNAL_MODE] = b"\1\1"
        return bytes(content)

    def close(self) -> None:
        """Copy the write-ahead log into the database, unless a reader prevents that, and close the file."""
        self._connection.close()

    def _check(self, contract: TokenContract) -> None:
        (found,) = self._connection.execute("pragma quick_check(1)").fetchone()
        if found != "ok":
            raise corrupt(self.path, found)
        self._connection.executescript(TABLES)
        meta = read_meta(self._connection, self.path)
        own = {name.decode(): value.decode() for name, value in contract.to_metadata().items()}
        if not meta:
            new = {"contract": own, "format": FORMAT}
            self._write([_insert("meta", (key, json.dumps(value))) for key, value in new.items()], full_sync=True)
        elif (number := json.loads(meta["format"])) != FORMAT:
            raise ValueError(
                f"{self.path} has format {number}; this program reads {FORMAT}: use the version of the program that "
                "wrote it, or another run folder"
            )
        elif json.loads(meta["contract"]) != own:
            raise ValueError(
                f"{self.path.parent} holds trajectories of another tokenizer ({meta['contract']}, this run has "
                f"{json.dumps(own)}): use another run folder"
            )

    def _write(self, statements: Sequence[_Statement], full_sync: bool) -> None:
        run = self._connection.execute
        with self._lock:
            try:
                if full_sync != self._is_full_sync:
                    run(f"pragma synchronous={'full' if full_sync else 'normal'}")
                    self._is_full_sync = full_sync
                if len(statements) == 1:  # is a transaction of its own
                    run(*statements[0])
                    return
                run("begin immediate")
                for statement in statements:
                    run(*statement)
                run("commit")
            except sqlite3.Error as error:
                if self._connection.in_transaction:
                    run("rollback")
                raise self._os_error(error) from error

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if _code(error) in _REFUSED:
                raise self._os_error(error) from error
            raise corrupt(self.path, str(error)) from error
        except UnicodeDecodeError as error:  # of the names that an error of SQLite quotes
            raise corrupt(self.path, str(error)) from error

    def _os_error(self, error: sqlite3.Error) -> OSError:
        number = _REFUSED.get(_code(error), errno.EIO)
        return OSError(number, f"{os.strerror(number)} ({error})", str(self.path))


def _code(error: sqlite3.Error) -> int:
    code: int = getattr(error, "sqlite_errorcode", -1)  # without one where the error is not SQLite's own
    return code & 0xFF if code >= 0 else code


def _insert(table: str, row: tuple[object, ...]) -> _Statement:
    places = ", ".join("?" * (len(row) + 1))
    return f"insert or replace into {table} values({places})", (*row, row_checksum(row))
