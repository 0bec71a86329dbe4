"""Metrics of a run: one JSON line per step, and the trackers that the user chose (names: docs/metrics.md)."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from learner.metrics.trackers import Int64, OnlineTracker, TensorBoardTracker, Tracker, TrackerName, check_trackers


class MetricsLog:
    """Appends to `metrics.jsonl` (every line at once, so that a killed run keeps its curve) and to the trackers.

    Numbers that are not finite are null in the file, since JSON has none. A run that resumes writes the steps after
    its checkpoint again: of two lines of one stage and step the later one counts.
    """

    def __init__(self, run_folder: Path, trackers: Sequence[TrackerName] = ("tensorboard",)) -> None:
        """Raises as `check_trackers`."""
        check_trackers(trackers)
        self._trackers: list[Tracker] = [
            TensorBoardTracker(run_folder) if name == "tensorboard" else OnlineTracker(name, run_folder)
            for name in trackers
        ]
        self._path = run_folder / "metrics.jsonl"
        _drop_unfinished_line(self._path)
        self._file = self._path.open("ab", buffering=0)  # so nothing is left to be written by `close`

    def write(
        self, stage: str, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Int64] | None = None
    ) -> None:
        """Log one step of a stage. histograms: samples whose distribution the trackers show; not in the file. OSError:
        the disk refused; the file may end in a part of the line."""
        row: dict[str, str | int | float | None] = {"time": round(time.time(), 3), "stage": stage, "step": step}
        row |= {name: float(f"{value:.6g}") if math.isfinite(value) else None for name, value in metrics.items()}
        content = f"{json.dumps(row, allow_nan=False)}\n".encode()
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError as error:
            error.filename = str(self._path)  # a descriptor says nothing to whoever has to make room
            raise
        for tracker in self._trackers:
            tracker.write(stage, step, metrics, histograms or {})

    def close(self) -> None:
        """Flush and close all."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except OSError:
            if error is None:  # else the disk that is full has said so, and what ended the stage is told
                raise


def _drop_unfinished_line(path: Path) -> None:
    """Cut off what stands after the last line break: the rest of a line that a crash of the machine kept short."""
    if path.exists():
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            with path.open("r+b") as file:
                file.truncate(end)
