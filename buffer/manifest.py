"""The manifest of a buffer folder: which segments count, and which of their rows are no longer live.

Readers trust the manifest only. It is replaced as a whole (temporary file, fsync, rename), so a crash leaves
either the old one or the new one. What a crash can undo is derivable: rows in the open segment by reading it,
evictions since the last manifest from the capacity noted here.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypedDict

from buffer.schema import TokenContract

MANIFEST_NAME = "manifest.json"
FORMAT = 1


class CorruptSegmentError(ValueError):
    """A file of the buffer folder is not what was written; the message names it and says what to do."""


@dataclass(frozen=True)
class SegmentEntry:
    """One sealed segment. checksum: xxh3-128 of the file; versions: -1 where no row has one."""

    number: int
    first_row: int
    num_rows: int
    size_bytes: int
    checksum: str
    oldest_version: int
    newest_version: int


@dataclass(frozen=True)
class Manifest:
    """State of a buffer folder. A row's number is its place in the order of insertion, over all sources.

    capacity: rows per source when this was written; evictions since then followed it.
    open_segment, next_row: number of the segment that takes inserts, and of its first row.
    newest_version: newest policy version at a draw or in a sealed row; -1 before any.
    inserted: rows per source in sealed segments, deleted ones included.
    live_from: per source, rows before this number were evicted.
    dropped: rows per source dropped as stale.
    stale_before_row, stale_below: rows before the one whose oldest version is below the other were dropped.
    segments: sealed segments that still hold a live row, by number.
    """

    contract: TokenContract
    capacity: int
    open_segment: int = 1
    next_row: int = 0
    newest_version: int = -1
    inserted: dict[str, int] = field(default_factory=dict)
    live_from: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    stale_before_row: int = 0
    stale_below: int = 0
    segments: tuple[SegmentEntry, ...] = ()

    def write(self, folder: Path) -> None:
        """Replace the manifest of `folder`; on return it is on disk."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1)
        replace_file(folder / MANIFEST_NAME, text.encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest of `folder`, None where there is none.

        Raises:
            CorruptSegmentError: it cannot be read, or another version of this program wrote it.
        """
        path = folder / MANIFEST_NAME
        if not path.exists():
            return None
        try:
            content: _ManifestJson = json.loads(path.read_bytes())
            if content["format"] != FORMAT:
                raise CorruptSegmentError(
                    f"{path} has format {content['format']}; this program reads {FORMAT}: use the version of the "
                    "program that wrote it, or another folder"
                )
            return cls(
                contract=TokenContract(**content["contract"]),
                capacity=content["capacity"],
                open_segment=content["open_segment"],
                next_row=content["next_row"],
                newest_version=content["newest_version"],
                inserted=content["inserted"],
                live_from=content["live_from"],
                dropped=content["dropped"],
                stale_before_row=content["stale_before_row"],
                stale_below=content["stale_below"],
                segments=tuple(SegmentEntry(**entry) for entry in content["segments"]),
            )
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise CorruptSegmentError(
                f"{path} is damaged ({error}): restore it from a copy, or move {folder} away to begin with an empty "
                "buffer"
            ) from error


class _ContractJson(TypedDict):
    vocab_size: int
    backspace_id: int
    eos_id: int
    tokenizer_hash: str


class _EntryJson(TypedDict):
    number: int
    first_row: int
    num_rows: int
    size_bytes: int
    checksum: str
    oldest_version: int
    newest_version: int


class _ManifestJson(TypedDict):
    format: int
    contract: _ContractJson
    capacity: int
    open_segment: int
    next_row: int
    newest_version: int
    inserted: dict[str, int]
    live_from: dict[str, int]
    dropped: dict[str, int]
    stale_before_row: int
    stale_below: int
    segments: list[_EntryJson]


def replace_file(path: Path, content: bytes) -> None:
    """Write temporary, fsync, rename, fsync the folder: after a crash `path` is the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
