"""Where the checkpoints of a stage lie, and which of them are kept.

One interface, two places: a folder, where renaming is atomic (`LocalCheckpoints`), and object storage, where it is not
(`learner.checkpoints.remote`). In both a checkpoint is complete or absent, whenever the process is killed.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from buffer.disk import is_disk_full
from learner.checkpoints.progress import Progress, read_progress

_CHECKPOINT = re.compile(r"step-(\d{6,})(?:\.replaced)?")


class CheckpointStore(Protocol):
    """Complete checkpoints of one stage, by step. One process at a time writes."""

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, ascending."""

    def progress(self, step: int) -> Progress:
        """Progress of a checkpoint. ValueError: it is not one of this program. OSError: it cannot be read."""

    def folder(self, step: int) -> Path:
        """A local folder with all files of a checkpoint, fetched if need be."""

    def location(self, step: int) -> str:
        """Where the checkpoint of a step is, or would be, for people."""

    def write(self, step: int, fill: Callable[[Path], None]) -> None:
        """Let `fill` write the files into an empty folder, and make them the checkpoint of `step` at one stroke."""

    def remove(self, step: int) -> None:
        """Delete a checkpoint."""


def step_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:06d}"


def remove_superseded(store: CheckpointStore, keep: int, best_metric: str | None) -> None:
    """Delete all checkpoints but the `keep` newest and, by the least mean of `best_metric`, the best (of equals the
    earliest).
    """
    assert keep > 0
    steps = store.steps()
    kept = set(steps[-keep:])
    if best_metric is not None and steps:
        means = {step: store.progress(step).metrics.get(best_metric) for step in steps}
        measured = {step: mean for step, mean in means.items() if mean is not None}
        if measured:
            kept.add(min(measured, key=lambda step: (measured[step], step)))
    for step in steps:
        if step not in kept:
            store.remove(step)


class LocalCheckpoints:
    """Checkpoints in a folder, `step-<n>` each. Folders are filled and emptied under a `.tmp` name only. Where a step
    is written again, what it replaces stays as `step-<n>.replaced` until the new one is in place."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def steps(self) -> list[int]:
        return sorted(self._paths())

    def progress(self, step: int) -> Progress:
        return read_progress(self.folder(step))

    def folder(self, step: int) -> Path:
        return self._paths()[step]

    def location(self, step: int) -> str:
        return str(self._folder / step_name(step))

    def write(self, step: int, fill: Callable[[Path], None]) -> None:
        """Fill a temporary folder, make it durable, and rename it into place. OSError: the disk refused; what was there
        before is still there."""
        self._sweep()
        final = self._folder / step_name(step)
        temporary = self._folder / f"{final.name}.tmp"
        temporary.mkdir(parents=True)
        try:
            fill(temporary)
            for path in temporary.rglob("*"):
                _fsync(path)
            _fsync(temporary)
        except Exception as error:
            if is_disk_full(error):  # the log of the run and the buffer need room to end well
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        if final.exists():
            final.rename(_replaced(final))
        temporary.rename(final)
        _fsync(self._folder)
        self._sweep()

    def remove(self, step: int) -> None:
        _discard(self.folder(step))

    def _paths(self) -> dict[int, Path]:
        if not self._folder.is_dir():
            return {}
        by_step: dict[int, Path] = {}
        for path in sorted(self._folder.iterdir(), reverse=True):  # `step-<n>` after, and so over, `step-<n>.replaced`
            if (match := _CHECKPOINT.fullmatch(path.name)) and path.is_dir():
                by_step[int(match[1])] = path
        return by_step

    def _sweep(self) -> None:
        """Remove what a killed process left half-written or half-removed, and checkpoints that have been replaced."""
        for leftover in self._folder.glob("step-*.tmp"):
            shutil.rmtree(leftover)
        for path in self._paths().values():
            if _replaced(path).is_dir():
                _discard(_replaced(path))


def checkpoints_of(folder: Path) -> list[Path]:
    """Complete checkpoints in a stage's folder, oldest first."""
    local = LocalCheckpoints(folder)
    return [local.folder(step) for step in local.steps()]


def _replaced(final: Path) -> Path:
    return final.with_name(f"{final.name}.replaced")


def _discard(path: Path) -> None:
    """Remove a checkpoint; renamed first, since a folder that is being emptied must not look complete."""
    doomed = path.with_name(f"{path.name}.removed.tmp")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
