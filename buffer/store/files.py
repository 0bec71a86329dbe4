"""The segments of an open shard: which there are, where each batch lies, and how they change with the catalog."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from buffer.settings import BufferSettings
from buffer.store.archive import Archive
from buffer.store.catalog import FACTS, BatchEntry, EventEntry, SegmentEntry, segment_path
from buffer.store.catalog_writer import CatalogWriter, Change, Deletion
from buffer.store.compaction import Rewrite, RewritePlan, SegmentUse, StoredMessage, worth_rewriting
from buffer.store.draws import RepeatableDraws
from buffer.store.gather import Gather, mark_null_items
from buffer.store.segments import (
    MOST_BYTES,
    MessageEncoder,
    OpenSegment,
    SegmentMaps,
    create_segment,
    message_checksum,
)
from buffer.store.table import NO_ROWS, NOT_STORED, ReplayTable
from buffer.trajectory.schema import TokenContract, stored_schema

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]


@dataclass
class StoredSegment:
    """size: of a sealed file, None while it takes inserts; messages: by row."""

    number: int
    size: int | None
    messages: list[StoredMessage] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        """Stored rows."""
        return sum(message.num_rows for message in self.messages)


class ShardFiles:
    """The segments of a folder. Memory follows the catalog: nothing changes here when a commit failed."""

    def __init__(
        self,
        folder: Path,
        contract: TokenContract,
        settings: BufferSettings,
        catalog: CatalogWriter,
        table: ReplayTable,
    ) -> None:
        """catalog, table: of the shard; `buffer.store.recovery` adds what the folder holds."""
        self.folder = folder
        self.schema = stored_schema(contract)
        self.header = self.schema.serialize()
        self.maps = SegmentMaps(folder)
        self.gather = Gather(self.schema, table, self.maps)
        self.segments: dict[int, StoredSegment] = {}
        self.next_row = 0
        self._catalog = catalog
        self._table = table
        self._settings = settings
        self.room = min(settings.segment_bytes, MOST_BYTES)
        self._encoder = MessageEncoder(self.schema)
        self._open: OpenSegment | None = None
        self._open_number = 0
        self._next_number = 1  # of a new file

    def add(self, entry: SegmentEntry) -> pa.Buffer:
        """A segment of the catalog; gives its content."""
        self.segments[entry.number] = StoredSegment(entry.number, entry.size)
        self._next_number = max(self._next_number, entry.number + 1)
        return self.maps.map(entry.number)

    def add_batch(self, entry: BatchEntry) -> None:
        """A batch of the catalog."""
        message = StoredMessage(entry.first_row, entry.num_rows, entry.offset, entry.length)
        self.segments[entry.segment].messages.append(message)
        self.gather.add(entry.segment, entry.offset, entry.length)

    def begin_inserts(self) -> None:
        """Go on with the segment that takes inserts, or begin the first one."""
        unsealed = [segment for segment in self.segments.values() if segment.size is None]
        if unsealed:
            (segment,) = unsealed
            self._open_number = segment.number
            path = segment_path(self.folder, segment.number)
            self._open = OpenSegment(path, self.end_of(segment), self._settings.fsync == "batch")
        else:
            self._begin_segment(0)

    def end_of(self, segment: StoredSegment) -> int:
        """Where the committed bytes of a segment end."""
        if segment.size is not None:
            return segment.size
        end: int = self.header.size
        return max([end, *(each.offset + each.length for each in segment.messages[-1:])])

    @property
    def size_bytes(self) -> int:
        """Committed bytes of all segments."""
        return sum(self.end_of(segment) for segment in self.segments.values())

    @property
    def sealed(self) -> list[StoredSegment]:
        """Sealed segments, by their rows."""
        found = [segment for segment in self.segments.values() if segment.size is not None]
        return sorted(found, key=lambda segment: segment.messages[0].first_row if segment.messages else NOT_STORED)

    # Inserts

    def append(
        self, batch: pa.RecordBatch, facts: npt.NDArray[np.void], newest_version: int, more: Sequence[EventEntry]
    ) -> None:
        """Store a batch with its row numbers, which begin at `next_row`; its rows are live then. more: events that are
        committed with it.

        Raises:
            ValueError: the batch is too large for a file. OSError: the disk refused; the rows are not stored, unless
                the process dies before the next insert: then they may be.
        """
        message = self._encoder.encode(mark_null_items(batch))
        opened = self._with_room(len(message))
        opened.write(message)
        entry = BatchEntry(
            first_row=self.next_row,
            num_rows=batch.num_rows,
            segment=self._open_number,
            offset=opened.end,
            length=len(message),
            newest_version=newest_version,
            message_checksum=message_checksum(message),
            rows=None,
            facts=facts.tobytes(),
        )
        self.commit_batch(entry, facts, more)
        opened.end += len(message)

    def commit_batch(self, entry: BatchEntry, facts: npt.NDArray[np.void], more: Sequence[EventEntry] = ()) -> None:
        """A batch that is in its segment counts from now on; see `append`.

        Raises:
            OSError: the disk refused.
        """
        # Without a sync: a batch that is in the segment, but not in the catalog, is adopted when the shard is opened.
        self._catalog.commit([entry, *more], self.next_row, durable=bool(more))
        self._table.add(entry.row_numbers, facts, entry.segment)
        self.add_batch(entry)
        self.next_row += entry.num_rows

    def drop_batches(self, entries: Sequence[BatchEntry]) -> None:
        """The catalog holds these batches no longer."""
        firsts = {entry.first_row for entry in entries}
        for segment in self.segments.values():
            segment.messages = [each for each in segment.messages if each.first_row not in firsts]
        for entry in entries:
            self.gather.forget(entry.segment, entry.offset)

    def _with_room(self, num_bytes: int) -> OpenSegment:
        """The segment that takes inserts, with room for so many bytes."""
        assert self._open is not None, "the files were opened"
        if self._open.end + num_bytes > self._open.room and self._open.end > self.header.size:
            self._seal(num_bytes)
        end = self._open.end + num_bytes
        if end > MOST_BYTES:
            raise ValueError(f"a batch of {num_bytes:,} bytes is too large for a segment: insert fewer rows at once")
        if end > self._open.room:  # a batch larger than a segment
            self._open.grow(end)
            self.maps.map(self._open_number)
        return self._open

    def _seal(self, num_bytes: int) -> None:
        """The next segment, with room for so many bytes at least, takes inserts from now on.

        Raises:
            OSError: the disk refused; the segment stays as it is.
        """
        number, opened = self._open_number, self._open
        assert opened is not None, "the files were opened"
        if self._settings.fsync != "batch":
            opened.prepare_sync()()
        self._begin_segment(num_bytes, sealed=SegmentEntry(number, opened.end))
        self.segments[number].size = opened.end
        opened.grow(opened.end)
        opened.close()
        self.maps.map(number)

    def _begin_segment(self, num_bytes: int, sealed: SegmentEntry | None = None) -> None:
        number = self._take_number()
        path = segment_path(self.folder, number)
        new = SegmentEntry(number, None)
        changes: list[Change] = [new] if sealed is None else [sealed, new]
        try:
            create_segment(path, self.header, max(self.room, self.header.size + num_bytes))
            self._catalog.commit(changes, self.next_row)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        self._open = OpenSegment(path, self.header.size, self._settings.fsync == "batch")
        self._open_number = number
        self.add(new)

    def _take_number(self) -> int:
        self._next_number += 1
        return self._next_number - 1

    # What is needed no longer

    def unneeded(self, draws: RepeatableDraws) -> list[int]:
        """Sealed segments of which no row is live or pinned."""
        dead = [
            each for each in self.segments.values() if each.size is not None and not self._table.live_in[each.number]
        ]
        if not dead:
            return []
        pinned = set(self._table.segment[self._table.slots(draws.pinned_rows)].tolist())
        return [each.number for each in dead if each.number not in pinned]

    def plan_rewrite(self, draws: RepeatableDraws, archive: Archive | None) -> RewritePlan | None:
        """Of the segments that nobody needs, else of those that are worth it; None where there are none."""
        numbers = self.unneeded(draws) or self._sparse(draws.pinned_rows)
        return self.plan(numbers, draws.pinned_rows, archive) if numbers else None

    def plan(self, numbers: Sequence[int], pinned_rows: Int64, archive: Archive | None) -> RewritePlan:
        """A rewriting of these segments."""
        table = self._table
        is_kept = table.live[table.filled].copy()
        is_kept[table.slots(pinned_rows)] = True
        is_kept &= np.isin(table.segment[table.filled], numbers)
        messages = {each: (self.maps.content(each), tuple(self.segments[each].messages)) for each in numbers}
        kept_rows = np.flatnonzero(is_kept) + table.base
        return RewritePlan(self.folder, self.schema, messages, kept_rows, self._take_number(), archive)

    def finish(self, rewrite: Rewrite) -> UInt64:
        """Put a rewriting in the place of its segments; gives the hashes of the ids that are stored no longer.

        Raises:
            OSError: the disk refused; nothing has changed.
        """
        table, old, new = self._table, list(rewrite.plan.messages), rewrite.plan.number
        firsts = [message.first_row for number in old for message in self.segments[number].messages]
        entries = [entry._replace(facts=self._facts(entry.row_numbers)) for entry in rewrite.written]
        written = [SegmentEntry(new, entries[-1].offset + entries[-1].length)] if entries else []
        self._catalog.commit([Deletion(firsts, old), *written, *entries, *rewrite.deletions], self.next_row)
        for segment in written:
            self.add(segment)
        for entry in entries:
            table.move(entry.row_numbers, new)
            self.add_batch(entry)
        for number in old:
            for message in self.segments.pop(number).messages:
                self.gather.forget(number, message.offset)
            self.maps.unmap(number)
        leaving = np.concatenate([NO_ROWS, *(event.row_numbers for event in rewrite.deletions)])
        hashes = table.hash[table.slots(leaving)]
        table.move(leaving, NOT_STORED)
        for number in old:
            del table.live_in[number]
            segment_path(self.folder, number).unlink(missing_ok=True)
        return hashes

    def _sparse(self, pinned_rows: Int64) -> list[int]:
        """Numbers of segments that are worth a rewriting."""
        table = self._table
        dead = pinned_rows[~table.is_live(pinned_rows)]
        num_pinned = Counter(table.segment[table.slots(dead)].tolist())
        uses = [
            SegmentUse(
                number=each.number,
                size=self.end_of(each),
                num_rows=each.num_rows,
                num_needed=table.live_in[each.number] + num_pinned[each.number],
            )
            for each in self.sealed
        ]
        return worth_rewriting(uses, self._settings.compact_below, self.room)

    def _facts(self, rows: Int64) -> bytes:
        """What the catalog holds of stored rows."""
        facts = np.empty(len(rows), FACTS)
        for name in FACTS.names or ():
            facts[name] = getattr(self._table, name)[self._table.slots(rows)]
        return facts.tobytes()

    # Durability

    def close(self) -> None:
        """Make every batch durable; the segment that takes inserts gives back the room that it has left."""
        assert self._open is not None, "the files were opened"
        self._open.grow(self._open.end)
        self._open.close()

    def prepare_sync(self) -> Callable[[], None]:
        """A function that makes every batch until now durable; it may run in any thread, also after `close`."""
        assert self._open is not None, "the files were opened"
        return self._open.prepare_sync()
