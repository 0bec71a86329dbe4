"""Sealing a full segment beside the work of the store.

    plan     which one                                                                   quick
    run      sync, second name, checksum, map                                            slow, in a thread of its own
    finish   rows noted in the log, manifest, the first name goes                        quick

Inserts go on in the next open segment meanwhile. When that one is full too, they wait: there are never more than two.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from buffer.store.compaction import entry_of
from buffer.store.manifest import SegmentEntry
from buffer.store.row_numbers import Int64
from buffer.store.sealed_segments import seal_open
from buffer.store.segments import open_path, read_batches, sealed_path
from buffer.trajectory.schema import ROW, SOURCES

SEAL_TIMEOUT_S = 300.0
"""A disk that takes longer to write one segment does not work."""


@dataclass(frozen=True)
class Seal:
    """A sealed file that waits for the manifest. content: of it, mapped. rows: numbers by source, ascending; sources
    without any are absent."""

    entry: SegmentEntry
    content: pa.Buffer
    rows: Mapping[str, Int64]


@dataclass(frozen=True)
class SealPlan:
    """The full segment `number`, which has one row at least."""

    folder: Path
    schema: pa.Schema
    number: int

    def run(self) -> Seal:
        """Make the sealed file, in any thread.

        Raises:
            OSError: the disk refused; nothing has changed.
        """
        path = sealed_path(self.folder, self.number)
        sealed = seal_open(open_path(self.folder, self.number), path)
        content = pa.memory_map(str(path)).read_buffer()
        batches = [batch for batch, _ in read_batches(content, self.schema)]
        stored = pa.Table.from_batches(batches).select(["source", ROW])
        by_source = {source: stored.filter(pc.equal(stored.column("source"), source)) for source in SOURCES}
        rows = {source: own.column(ROW).to_numpy() for source, own in by_source.items() if len(own)}
        return Seal(entry_of(self.number, sealed, batches), content, rows)


class Sealer:
    """Runs one plan at a time in a thread. Its methods are called by one thread at a time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="seal")
        self._running: Future[Seal] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether `result` is still to be fetched."""
        return self._running is not None

    @property
    def is_done(self) -> bool:
        """Whether `result` comes at once."""
        return self._running is not None and self._running.done()

    def start(self, plan: SealPlan) -> None:
        """Begin to run `plan`; the result of the one before was fetched."""
        assert self._running is None, "one at a time"
        self._running = self._thread.submit(plan.run)

    def result(self) -> Seal:
        """What the plan came to, waiting for it.

        Raises:
            OSError: the disk refused, and the plan is to be run again; or (`TimeoutError`) the disk hangs.
        """
        assert self._running is not None, "a plan was started"
        concurrent.futures.wait([self._running], timeout=SEAL_TIMEOUT_S)
        if not self._running.done():
            raise TimeoutError(f"the disk did not take a sealed segment within {SEAL_TIMEOUT_S:.0f} s")
        done, self._running = self._running, None
        return done.result()

    def close(self) -> None:
        """End the thread; nothing is running."""
        assert self._running is None, "what runs writes into the folder"
        self._thread.shutdown()
