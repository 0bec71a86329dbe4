"""Metrics of a run: one JSON line per step, and TensorBoard events beside it."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter


class MetricsLog:
    """Appends to `metrics.jsonl` (flushed every line, so that a killed run keeps its curve) and to TensorBoard.

    Numbers that are not finite are null in the file, since JSON has none. A run that resumes writes the steps after
    its checkpoint again: of two lines of one stage and step the later one counts.
    """

    def __init__(self, run_folder: Path) -> None:
        path = run_folder / "metrics.jsonl"
        _drop_unfinished_line(path)
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(run_folder / "tensorboard"))

    def write(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Log one step of a stage."""
        row: dict[str, str | int | float | None] = {"time": round(time.time(), 3), "stage": stage, "step": step}
        row |= {name: float(f"{value:.6g}") if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._events.add_scalar(f"{stage}/{name}", value, step)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._events.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _drop_unfinished_line(path: Path) -> None:
    """Cut off what stands after the last line break: the rest of a line that a crash of the machine kept short."""
    if path.exists():
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            with path.open("r+b") as file:
                file.truncate(end)
