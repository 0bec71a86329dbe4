"""Metrics of a run: one JSON line per step, and the trackers that the user chose (names: docs/metrics.md)."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

TrackerName = Literal["tensorboard", "wandb", "trackio"]
Int64 = npt.NDArray[np.int64]

PROJECT = "sequencematch"


class Tracker(Protocol):
    """A sink of metrics."""

    def write(self, stage: str, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Int64]) -> None:
        """Log one step of a stage: scalars by name, and samples whose distribution is shown, by name."""

    def close(self) -> None:
        """Flush and end."""


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Raise ImportError, which names the extra to install, for a tracker that cannot be imported."""
    for name in names:
        if find_spec(name) is None:
            raise ImportError(
                f"tracker {name!r} is not installed: pip install 'sequencematch[{name}]', or remove it from `trackers`"
            )


class TensorBoardTracker:
    """Event files in `tensorboard/` of the run folder; the stage is the first part of a scalar's name."""

    def __init__(self, run_folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._events = SummaryWriter(str(run_folder / "tensorboard"))

    def write(self, stage: str, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Int64]) -> None:
        """OSError, which names the folder: this or an earlier step could not be written."""
        with self._place_named():
            for name, value in metrics.items():
                self._events.add_scalar(f"{stage}/{name}", value, step)
            for name, samples in histograms.items():
                self._events.add_histogram(f"{stage}/{name}", samples, step)

    def close(self) -> None:
        with self._place_named():
            self._events.close()

    @contextmanager
    def _place_named(self) -> Iterator[None]:
        """Add the path to an error: TensorBoard's writer thread raises errors without one."""
        try:
            yield
        except OSError as error:
            error.filename = self._events.get_logdir()
            raise


class OnlineTracker:
    """Weights & Biases or trackio. Each stage is one run of the tracker, all in one group, so that their curves share a
    plot; a resumed stage continues its run.

    The tracker's own settings say where the metrics go (`WANDB_MODE=offline`: the run folder; `TRACKIO_DIR`: trackio's
    folder). Weights & Biases refuses to go back in steps: if a resumed stage repeats steps, the old values stay.
    """

    def __init__(self, name: Literal["wandb", "trackio"], run_folder: Path) -> None:
        self._library = import_module(name)  # trackio follows the interface of Weights & Biases
        self._has_run_ids = name == "wandb"
        self._folder = run_folder
        self._stage = ""
        self._run: Any = None

    def write(self, stage: str, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Int64]) -> None:
        if self._run is None or self._stage != stage:
            self.close()
            run = f"{self._folder.name}-{stage}"
            own = {"id": run, "dir": str(self._folder)} if self._has_run_ids else {"embed": False}
            self._run = self._library.init(project=PROJECT, name=run, group=self._folder.name, resume="allow", **own)
            self._stage = stage
        shown = {name: self._library.Histogram(samples.tolist()) for name, samples in histograms.items()}
        self._run.log({**metrics, **shown}, step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


class MetricsLog:
    """Appends to `metrics.jsonl` (each line at once, so that a killed run keeps its metrics) and to the trackers.

    Numbers that are not finite are null in the file, since JSON has none. A resumed run writes the steps after its
    checkpoint again: the last line of a stage and step is valid.
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
        self._file = self._path.open("ab", buffering=0)  # so that `close` has nothing to write

    def write(
        self, stage: str, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Int64] | None = None
    ) -> None:
        """Log one step of a stage. histograms: samples whose distribution the trackers show; not in the file. OSError:
        the line was not written, or only a part of it."""
        row: dict[str, str | int | float | None] = {"time": round(time.time(), 3), "stage": stage, "step": step}
        row |= {name: float(f"{value:.6g}") if math.isfinite(value) else None for name, value in metrics.items()}
        content = f"{json.dumps(row, allow_nan=False)}\n".encode()
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError as error:
            error.filename = str(self._path)  # the error names only a descriptor
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
            if error is None:  # else the first error is raised
                raise


def _drop_unfinished_line(path: Path) -> None:
    """Truncate after the last line break: a crash of the machine may leave a part of a line."""
    if path.exists():
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            with path.open("r+b") as file:
                file.truncate(end)


def distribution_metrics(name: str, samples: Int64) -> dict[str, float]:
    """Mean, median, 95th percentile and maximum of [n] samples, as scalars."""
    p50, p95 = np.quantile(samples, [0.5, 0.95])
    return {
        f"{name}_mean": float(samples.mean()),
        f"{name}_p50": float(p50),
        f"{name}_p95": float(p95),
        f"{name}_max": float(samples.max()),
    }
