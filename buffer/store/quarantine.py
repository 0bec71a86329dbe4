"""Where damaged files of a shard are put aside, each with a text that says why.

    quarantine/segment-000003.arrows                     a sealed segment, whole
    quarantine/segment-000004.arrows.open.1024-2048      bytes of an open segment
    quarantine/….txt                                     what was wrong, and which rows were lost

What lies there is never read again; it is kept for whoever wants to rescue rows by hand.
"""

from __future__ import annotations

import logging
from pathlib import Path

from buffer.store.manifest import replace_file, sync_folder

logger = logging.getLogger(__name__)

QUARANTINE = "quarantine"


def quarantined(folder: Path) -> tuple[str, ...]:
    """Names of what was put aside since the folder exists."""
    return tuple(sorted(path.name.removesuffix(".txt") for path in (folder / QUARANTINE).glob("*.txt")))


def set_file_aside(path: Path, reason: str) -> None:
    """Move a file, if it is there at all, out of the way."""
    target = _target(path.parent, path.name)
    _explain(target, reason)
    if path.exists():
        path.rename(target)
        sync_folder(path.parent)


def set_bytes_aside(path: Path, start: int, end: int, reason: str) -> None:
    """Keep a copy of the bytes [start, end) of a file."""
    target = _target(path.parent, f"{path.name}.{start}-{end}")
    _explain(target, reason)
    with path.open("rb") as file:
        file.seek(start)
        replace_file(target, file.read(end - start))


def _target(folder: Path, name: str) -> Path:
    quarantine = folder / QUARANTINE
    quarantine.mkdir(exist_ok=True)
    target, number = quarantine / name, 1
    while target.exists() or target.with_name(target.name + ".txt").exists():
        number += 1
        target = quarantine / f"{name}.{number}"
    return target


def _explain(target: Path, reason: str) -> None:
    logger.warning("%s; what is left of it lies in %s", reason, target)
    replace_file(target.with_name(target.name + ".txt"), f"{reason}\n".encode())
