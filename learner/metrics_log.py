"""Metrics of a run: one JSON line per step, and TensorBoard events beside it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter


class MetricsLog:
    """Appends to `metrics.jsonl` (flushed every line, so that a killed run keeps its curve) and to TensorBoard."""

    def __init__(self, run_folder: Path) -> None:
        self._file = (run_folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._events = SummaryWriter(str(run_folder / "tensorboard"))

    def write(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Log one step of a stage."""
        row: dict[str, str | int | float] = {"time": round(time.time(), 3), "stage": stage, "step": step}
        row.update({name: float(f"{value:.6g}") for name, value in metrics.items()})
        self._file.write(json.dumps(row) + "\n")
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
