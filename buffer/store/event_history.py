"""The consumption log as a table: all events of a shard, for audits and queries.

    consumption-000001.arrows        sealed: history
    consumption-000002.arrows.open   takes events

Both are streams of records with a checksum each (see `buffer.store.segments`). Files are numbered without a gap.
"""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa

from buffer.store.events import EVENT_SCHEMA
from buffer.store.manifest import CorruptSegmentError
from buffer.store.segments import OPEN_SUFFIX, SEALED_SUFFIX, OpenScan, scan_open

LISTING_ATTEMPTS = 20
"""A listing is repeated when files were sealed meanwhile; a writer seals far less often than a reader lists."""

_NAME = re.compile(r"consumption-(\d{6,})\.arrows(\.open)?")


def open_log_path(folder: Path, number: int) -> Path:
    """Where file `number` of a log lies while it takes events."""
    return folder / f"consumption-{number:06d}{OPEN_SUFFIX}"


def sealed_log_path(folder: Path, number: int) -> Path:
    """Where file `number` of a log lies as history."""
    return folder / f"consumption-{number:06d}{SEALED_SUFFIX}"


def log_number(path: Path) -> int:
    """The number in the name of a file of a log."""
    match = _NAME.fullmatch(path.name)
    assert match, "only files of a log are asked for their number"
    return int(match[1])


def log_files(folder: Path) -> dict[int, Path]:
    """The files of a log by ascending number; a sealed one goes before its open copy that a crash left behind."""
    found: dict[int, Path] = {}
    for path in folder.glob("consumption-*"):
        if (match := _NAME.fullmatch(path.name)) and (match[2] is None or int(match[1]) not in found):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def read_events(folder: Path) -> pa.Table:
    """All events of the log in `folder`, in order, with the columns of `EVENT_SCHEMA`.

    Safe while a writer goes on: the table ends with a complete event. A folder without a log has no events.

    Raises:
        CorruptSegmentError: a file is damaged or missing; the message names it.
        TimeoutError: files were sealed faster than they could be read.
    """
    missing: list[int] = []
    for _ in range(LISTING_ATTEMPTS):
        files = log_files(folder)
        missing = sorted(set(range(min(files, default=0), max(files, default=0))) - set(files))
        if missing:
            continue  # unless it stays away, it was sealed between two steps of the listing
        try:
            records = [record for path in files.values() for record in read_log_file(path)]
        except FileNotFoundError:
            continue
        return pa.Table.from_batches(records, schema=EVENT_SCHEMA).combine_chunks()
    if missing:
        raise CorruptSegmentError(
            f"{sealed_log_path(folder, missing[0])} is missing: restore it from a copy, since the history has a gap "
            "without it"
        )
    raise TimeoutError(
        f"{folder}: its consumption log was sealed {LISTING_ATTEMPTS} times while it was read: try again"
    )


def read_log_file(path: Path) -> tuple[pa.RecordBatch, ...]:
    """Complete records of one file; see `scan_log_file`."""
    return scan_log_file(path).batches


def scan_log_file(path: Path) -> OpenScan:
    """What one file holds.

    Raises:
        FileNotFoundError: it was sealed meanwhile.
        CorruptSegmentError: it is damaged.
    """
    scan = scan_open(path, EVENT_SCHEMA)
    if scan.damaged or (scan.torn_bytes and path.suffix != ".open"):
        start, end = (scan.damaged[0].start, scan.damaged[0].end) if scan.damaged else (scan.end, scan.size_bytes)
        remedy = "restore it from a copy"
        if end == scan.size_bytes and path.suffix == ".open":
            remedy += f", or cut the last event off with `truncate -s {start} {path}` if the machine lost power"
        raise CorruptSegmentError(
            f"{path} is damaged from byte {start} to byte {end}: {remedy}. Without it nobody knows which rows were "
            "drawn and removed, so what remains is to move the folder away and to begin with an empty buffer"
        )
    return scan
