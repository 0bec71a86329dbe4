"""Where damaged bytes of a shard's segments are put aside, each with a text that says what they were.

    quarantine/segment-000003.arrows.1024-2048        bytes of the segment
    quarantine/segment-000003.arrows.1024-2048.txt    what was wrong, and which rows were lost

What lies there is never read again; it is kept for whoever wants to rescue rows by hand.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pyarrow as pa

from buffer.disk import sync_folder

logger = logging.getLogger(__name__)

QUARANTINE = "quarantine"


def quarantined(folder: Path) -> tuple[str, ...]:
    """Names of what was put aside since the folder exists."""
    return tuple(sorted(path.name.removesuffix(".txt") for path in (folder / QUARANTINE).glob("*.txt")))


def set_bytes_aside(path: Path, content: pa.Buffer, start: int, end: int, lost: str) -> None:
    """Keep a copy of the damaged bytes [start, end) of the segment in `path`, whose content this is. It may be shorter,
    or empty where the file is missing. lost: what is lost with them."""
    folder = path.parent / QUARANTINE
    folder.mkdir(exist_ok=True)
    target, number = folder / f"{path.name}.{start}-{end}", 1
    while target.with_name(f"{target.name}.txt").exists():
        number += 1
        target = folder / f"{path.name}.{start}-{end}.{number}"
    reason = f"{path} is damaged from byte {start} to byte {end}" if content.size else f"{path} is missing"
    logger.warning("%s: %s; what is left of it is in %s", reason, lost, target)
    _write(target.with_name(f"{target.name}.txt"), f"{reason}: {lost}\n".encode())
    _write(target, memoryview(content)[start:end])


def _write(path: Path, content: bytes | memoryview) -> None:
    """On return it is on disk, with its name."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)
