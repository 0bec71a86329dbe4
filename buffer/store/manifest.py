"""The manifest of a shard's folder: which segment files count, and their numbers.

Readers trust the manifest only. It is replaced as a whole (temporary file, fsync, rename), so a crash leaves either the
old one or the new one. Which rows of the segments are live is the business of the consumption log.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

import xxhash

from buffer.trajectory.schema import IdRanges, TokenContract

MANIFEST_NAME = "manifest.json"
FORMAT = 2


class CorruptSegmentError(ValueError):
    """A file of the buffer folder is not what was written; the message names it and says what to do."""


@dataclass(frozen=True)
class SegmentEntry:
    """One sealed segment; no other one has a row between its first and its last.

    number: of the file. first_row, last_row: numbers of rows, between which some may be missing after a compaction.
    checksum: xxh3-128 of the file; versions: -1 where no row has one.
    """

    number: int
    first_row: int
    last_row: int
    num_rows: int
    size_bytes: int
    checksum: str
    oldest_version: int
    newest_version: int


@dataclass(frozen=True)
class Manifest:
    """The files of a shard.

    open_segment: number of the first open segment; any open file with a higher number counts too, and rows come into
    the last one. next_row: no sealed segment has this row or a later one. next_segment: no file that this lists has
    this number or a higher one. segments: the sealed ones, by row.
    """

    contract: TokenContract
    open_segment: int = 1
    next_row: int = 0
    next_segment: int = 2
    segments: tuple[SegmentEntry, ...] = ()

    def write(self, folder: Path) -> None:
        """Replace the manifest of `folder`; on return it is on disk."""
        content = asdict(self)
        text = json.dumps({"format": FORMAT, "checksum": _checksum(content), **content}, indent=1)
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
                raise CorruptSegmentError(_other_format(path, content["format"]))
            manifest = cls(
                contract=TokenContract(**content["contract"]),
                open_segment=content["open_segment"],
                next_row=content["next_row"],
                next_segment=content["next_segment"],
                segments=tuple(SegmentEntry(**entry) for entry in content["segments"]),
            )
            if content["checksum"] != (found := _checksum(asdict(manifest))):
                raise ValueError(f"its checksum is {found} instead of {content['checksum']}")
            return manifest
        except CorruptSegmentError:
            raise
        except (ValueError, KeyError, TypeError) as error:  # of the decoders, of a field that is none, of the checksum
            raise CorruptSegmentError(
                f"{path} is damaged ({error}): restore it from a copy, or move {folder} away to begin with an empty "
                "buffer"
            ) from error


def _checksum(content: dict[str, object]) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _other_format(path: Path, found: int) -> str:
    if found < FORMAT:
        return (
            f"{path} has format {found}, of an earlier version of this program: its trajectories can be read and "
            f"queried, but no run goes on with them, since format {FORMAT} accounts for every row: use another run "
            "folder"
        )
    return f"{path} has format {found}; this program reads {FORMAT}: use the version of the program that wrote it"


class _ContractJson(TypedDict):
    vocab_size: int
    backspace_id: int
    eos_id: int
    tokenizer_hash: str
    ids_without_token: NotRequired[IdRanges]


class _EntryJson(TypedDict):
    number: int
    first_row: int
    last_row: int
    num_rows: int
    size_bytes: int
    checksum: str
    oldest_version: int
    newest_version: int


class _ManifestJson(TypedDict):
    format: int
    checksum: str
    contract: _ContractJson
    open_segment: int
    next_row: int
    next_segment: int
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
