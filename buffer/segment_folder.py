"""Steps of a store's life on its folder: opening the manifest, clearing up after a crash, sealing a segment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from buffer.manifest import CorruptSegmentError, Manifest, SegmentEntry
from buffer.schema import TokenContract
from buffer.segments import OPEN_SUFFIX, SEALED_SUFFIX, open_path, sealed_path, write_sealed
from buffer.staleness import VersionRange


def open_manifest(folder: Path, contract: TokenContract, capacity: int) -> Manifest:
    """The manifest of `folder`, written first where the folder is new.

    Raises:
        CorruptSegmentError: it is damaged, or there are segments without it.
        ValueError: the rows follow another token contract.
    """
    manifest = Manifest.read(folder)
    if manifest is None:
        if segments := [*folder.glob(f"segment-*{SEALED_SUFFIX}"), *folder.glob(f"segment-*{OPEN_SUFFIX}")]:
            raise CorruptSegmentError(
                f"{folder} holds {segments[0].name} but no manifest.json: restore it from a copy, or move the folder "
                "away to begin with an empty buffer"
            )
        manifest = Manifest(contract, capacity)
        manifest.write(folder)
    if manifest.contract != contract:
        raise ValueError(
            f"{folder} holds trajectories of another tokenizer ({manifest.contract}, this run has {contract}): use "
            "another run folder"
        )
    return manifest


def delete_leftovers(folder: Path, manifest: Manifest) -> None:
    """Delete what a crash between two steps of sealing or deleting left behind."""
    kept = {sealed_path(folder, entry.number) for entry in manifest.segments}
    kept.add(open_path(folder, manifest.open_segment))
    for path in folder.glob("segment-*"):
        if path not in kept:
            path.unlink()


def seal_rows(folder: Path, number: int, first_row: int, batches: Sequence[pa.RecordBatch]) -> SegmentEntry:
    """Write rows, numbered from `first_row`, as the sealed segment `number`; gives its entry for the manifest."""
    sealed = write_sealed(sealed_path(folder, number), batches, batches[0].schema)
    ranges = [VersionRange.from_batch(batch) for batch in batches]
    return SegmentEntry(
        number=number,
        first_row=first_row,
        num_rows=sum(batch.num_rows for batch in batches),
        size_bytes=sealed.size_bytes,
        checksum=sealed.checksum,
        oldest_version=min(int(versions.oldest.min()) for versions in ranges),
        newest_version=max(int(versions.newest.max()) for versions in ranges),
    )
