"""Opening the files of a shard: what a crash left behind is cleared up, what is damaged is put aside."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from buffer.store.event_history import log_files, open_log_path
from buffer.store.manifest import CorruptSegmentError, Manifest, SegmentEntry, sync_folder
from buffer.store.quarantine import set_bytes_aside, set_file_aside
from buffer.store.row_numbers import NO_ROWS, Int64
from buffer.store.sealed_segments import map_content
from buffer.store.segments import (
    OPEN_SUFFIX,
    SEALED_SUFFIX,
    OpenScan,
    OpenSegment,
    cut_torn_tail,
    open_numbers,
    open_path,
    read_batches,
    scan_open,
    sealed_path,
)
from buffer.trajectory.schema import TokenContract, rows_of

logger = logging.getLogger(__name__)


def find_manifest(folder: Path, contract: TokenContract) -> Manifest | None:
    """The manifest of `folder`, None where the folder is new.

    Raises:
        CorruptSegmentError: it is damaged, or there are segments without it, or it without a consumption log.
        ValueError: the rows follow another token contract.
    """
    manifest = Manifest.read(folder)
    if manifest is None:
        if segments := [*folder.glob(f"segment-*{SEALED_SUFFIX}"), *folder.glob(f"segment-*{OPEN_SUFFIX}")]:
            raise CorruptSegmentError(
                f"{folder} holds {segments[0].name} but no manifest.json: restore it from a copy, or move the folder "
                "away to begin with an empty buffer"
            )
        return None
    if manifest.contract != contract:
        raise ValueError(
            f"{folder} holds trajectories of another tokenizer ({manifest.contract}, this run has {contract}): use "
            "another run folder"
        )
    if not log_files(folder):
        raise CorruptSegmentError(
            f"{open_log_path(folder, 1).name} is missing in {folder}: restore it from a copy; without it nobody knows "
            "which rows are live, so what remains is to move the folder away and to begin with an empty buffer"
        )
    return manifest


@dataclass(frozen=True)
class FoundSegment:
    """content: of the file; batches: views of it."""

    content: pa.Buffer
    batches: tuple[pa.RecordBatch, ...]

    @property
    def rows(self) -> Int64:
        """[n] row numbers."""
        return np.concatenate([NO_ROWS, *(rows_of(batch) for batch in self.batches)])


@dataclass(frozen=True)
class FoundRows:
    """What the segments of a folder hold.

    manifest: as the files found make it: without the segments that had to be put aside, numbers of files that exist
    used up. sealed: per entry, mapped. opened: per open segment, by its number. next_row: number after the last row
    that the files show to have existed. cut_bytes: torn bytes cut off.
    """

    manifest: Manifest
    sealed: tuple[tuple[SegmentEntry, FoundSegment], ...]
    opened: tuple[tuple[int, FoundSegment], ...]
    next_row: int
    cut_bytes: int

    @property
    def batches(self) -> list[pa.RecordBatch]:
        """All, by row."""
        files = (segment.batches for _, segment in (*self.sealed, *self.opened))
        return [batch for batches in files for batch in batches]


def find_rows(folder: Path, manifest: Manifest, schema: pa.Schema) -> FoundRows:
    """Read the segments that count and delete the other files; damaged ones go to `quarantine/`.

    Raises:
        CorruptSegmentError: a segment holds rows of another schema.
    """
    _delete_leftovers(folder, manifest)
    sealed = []
    for entry in manifest.segments:
        try:
            sealed.append((entry, _found(map_content(folder, entry, schema), schema)))
        except CorruptSegmentError as error:
            lost = (
                f"lost with it: those of its {entry.num_rows} rows ({entry.first_row} to {entry.last_row}) still live"
            )
            set_file_aside(sealed_path(folder, entry.number), f"{error}; {lost}")
    if len(sealed) < len(manifest.segments):
        manifest = replace(manifest, segments=tuple(entry for entry, _ in sealed))
    opened: list[tuple[int, FoundSegment]] = []
    next_row, cut_bytes = manifest.next_row, 0
    for number in open_numbers(folder, manifest.open_segment):
        path = open_path(folder, number)
        scan = scan_open(path, schema)
        if scan.batches:
            next_row = int(rows_of(scan.batches[-1])[-1]) + 1
        if scan.damaged:
            _put_damage_aside(path, scan, schema)
            if scan.damaged[-1].end == scan.end:
                next_row += scan.damaged[-1].num_rows or 0
        elif scan.torn_bytes:
            logger.warning("%s: cut %d bytes of an unfinished insert off its end", path, scan.torn_bytes)
            cut_torn_tail(path, scan)
        cut_bytes += scan.torn_bytes
        segment = _found(pa.py_buffer(path.read_bytes()), schema)
        opened = [*(each for each in opened if each[1].batches), (number, segment)]  # nothing to seal in others
    if opened:
        next_segment = max(manifest.next_segment, opened[-1][0] + 1)
        manifest = replace(manifest, open_segment=opened[0][0], next_segment=next_segment)
    return FoundRows(manifest, tuple(sealed), tuple(opened), next_row, cut_bytes)


def _delete_leftovers(folder: Path, manifest: Manifest) -> None:
    """Delete what a crash between two steps of sealing, rewriting or deleting left behind."""
    kept = {sealed_path(folder, entry.number) for entry in manifest.segments}
    kept |= {open_path(folder, number) for number in open_numbers(folder, manifest.open_segment)}
    for path in folder.glob("segment-*"):
        if path not in kept:
            path.unlink()


def _put_damage_aside(path: Path, scan: OpenScan, schema: pa.Schema) -> None:
    """Copy what is damaged in an open segment, then write the segment anew without it."""
    for damage in scan.damaged:
        rows = "rows" if damage.num_rows is None else f"{damage.num_rows} rows"
        set_bytes_aside(
            path, damage.start, damage.end, f"{path} is damaged from byte {damage.start} to byte {damage.end} ({rows})"
        )
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    file = OpenSegment(temporary, schema, sync_each_batch=False)
    for batch in scan.batches:
        file.append(batch)
    file.close()
    os.rename(temporary, path)
    sync_folder(path.parent)


def _found(content: pa.Buffer, schema: pa.Schema) -> FoundSegment:
    """content: of a file that is whole; empty where not even the schema was written."""
    batches = read_batches(content, schema) if content.size else ()
    return FoundSegment(content, tuple(batch for batch, _ in batches))
