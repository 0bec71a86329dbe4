"""Writing the catalog of a shard: what changes together is one SQLite transaction.

In SQLite's write-ahead mode a commit survives the death of the process in any case. It survives a loss of power when it
is synced: `synchronous=FULL` for what `commit` is told to make durable, and whenever SQLite copies the write-ahead log
into the database. A later synced commit makes the ones before it durable, too.

Readers need shared memory with the writer, so they have to be on its host. On a file system that several hosts share
SQLite cannot offer that: there the writer holds the file alone (`locking_mode=EXCLUSIVE`), and readers get
`CatalogWriter.image`.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from buffer.disk import is_shared, sync_later
from buffer.store.catalog import (
    CATALOG_NAME,
    FORMAT,
    TABLES,
    BatchEntry,
    CorruptStoreError,
    EventEntry,
    SegmentEntry,
    corrupt,
    read_batches,
    read_events,
    read_meta,
    read_segments,
    row_checksum,
)
from buffer.trajectory.schema import TokenContract

WAL_BYTES = 2**20
"""The write-ahead log is cut to this size when SQLite has copied it into the database (every 1,000 pages)."""

_REFUSED = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_BUSY: errno.EBUSY,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
    sqlite3.SQLITE_PERM: errno.EACCES,
}
"""SQLite's codes of errors that are no damage of the file."""

_JOURNAL_MODE = slice(18, 20)
"""Bytes of a database's header: 2 with a write-ahead log, which a database in memory cannot have, else 1."""


@dataclass(frozen=True)
class Deletion:
    """Batches (by first row) and segments (by number) that count no longer."""

    batches: Sequence[int]
    segments: Sequence[int] = ()


@dataclass(frozen=True)
class CatalogContents:
    """segments, batches: in order. next_row: number of the next row to be inserted."""

    segments: list[SegmentEntry]
    batches: list[BatchEntry]
    next_row: int


Change = BatchEntry | SegmentEntry | EventEntry | Deletion
_Statement = tuple[str, tuple[object, ...]]


class CatalogWriter:
    """The catalog of a shard whose folder is locked. Not thread-safe."""

    def __init__(
        self, folder: Path, contract: TokenContract, sync: bool, clock: Callable[[], float] = time.time
    ) -> None:
        """Open the catalog, or create it. sync: whether durable commits survive a loss of power. clock: seconds since
        the epoch.

        Raises:
            CorruptStoreError: it is damaged, or missing beside segments.
            ValueError: the rows follow another token contract, or another version of this program wrote them.
            OSError: the disk refused, or another program has the catalog locked.
        """
        self.path = folder / CATALOG_NAME
        self._sync = sync
        self._clock = clock
        self._num_events = 0
        self._is_full_sync = False  # of the next commit
        self._lock = Lock()  # held while a transaction is under way
        if not self.path.exists() and (segments := sorted(folder.glob("segment-*.arrows"))):
            raise CorruptStoreError(
                f"{folder} holds {segments[0].name} but no {CATALOG_NAME}: restore it from a copy, or move the folder "
                "away to begin with an empty buffer"
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

    def read(self) -> CatalogContents:
        """Everything but the events.

        Raises:
            CorruptStoreError: a row is damaged. OSError: the disk refused.
        """
        with self._reading():
            meta = read_meta(self._connection, self.path)
            segments = read_segments(self._connection, self.path)
            batches = read_batches(self._connection, self.path)
        end_row = int(batches[-1].row_numbers[-1]) + 1 if batches else 0
        return CatalogContents(segments, batches, max(json.loads(meta.get("next_row", "0")), end_row))

    def events(self) -> Iterator[EventEntry]:
        """What happened, in order.

        Raises:
            CorruptStoreError: a row is damaged or missing. OSError: the disk refused.
        """
        with self._reading():
            for event in read_events(self._connection, self.path):
                self._num_events = event.seq
                yield event

    def commit(self, changes: Sequence[Change], next_row: int, durable: bool = True) -> None:
        """Write these changes, all or none. next_row: number of the next row to be inserted, before these changes.

        durable: whether they survive a loss of power (where the shard asks for that at all), not only the death of the
        process. Changes of segments always do: a file is deleted after them.

        Raises:
            OSError: the disk refused; nothing has changed.
        """
        num_events, at_us = self._num_events, int(self._clock() * 1e6)
        statements: list[_Statement] = []
        for change in changes:
            match change:
                case EventEntry():
                    num_events += 1
                    entry = change._replace(seq=num_events, at_us=at_us, next_row=next_row)
                    statements.append(_insert("events", entry))
                case BatchEntry():
                    statements.append(_insert("batches", change))
                case SegmentEntry():
                    statements.append(_insert("segments", change))
                case Deletion():
                    statements.append(_insert("meta", ("next_row", json.dumps(next_row))))
                    statements += [("delete from batches where first_row = ?", (row,)) for row in change.batches]
                    statements += [("delete from segments where number = ?", (number,)) for number in change.segments]
        files_change = any(isinstance(change, Deletion | SegmentEntry) for change in changes)
        self._write(statements, full_sync=files_change or (durable and self._sync))
        self._num_events = num_events

    def prepare_sync(self) -> Callable[[], None]:
        """A function that makes every commit until now durable; it may run in any thread, also after `close`."""
        return sync_later(os.open(f"{self.path}-wal", os.O_RDONLY))

    def image(self) -> bytes:
        """The catalog of now as a database of its own, for `sqlite3.Connection.deserialize`, or as a file. May be
        called in any thread.

        Raises:
            OSError: the disk refused.
        """
        with self._lock, self._reading():
            content = bytearray(self._connection.serialize())
        content[_JOURNAL_MODE] = b"\1\1"
        return bytes(content)

    def close(self) -> None:
        """Copy the write-ahead log into the database, where no reader prevents it, and let go of the file."""
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
        with self._lock:
            self._transact(statements, full_sync)

    def _transact(self, statements: Sequence[_Statement], full_sync: bool) -> None:
        run = self._connection.execute
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
    """SQLite's primary result code; -1 where the error is not SQLite's own."""
    code: int = getattr(error, "sqlite_errorcode", -1)
    return code & 0xFF if code >= 0 else code


def _insert(table: str, row: tuple[object, ...]) -> _Statement:
    places = ", ".join("?" * (len(row) + 1))
    return f"insert or replace into {table} values({places})", (*row, row_checksum(row))
