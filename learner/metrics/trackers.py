"""Where the metrics of a run are shown: TensorBoard, Weights & Biases, trackio. Each is imported when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
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
                f"tracker {name!r} is not installed: pip install 'sequencematch[{name}]', or take it out of `trackers`"
            )


class TensorBoardTracker:
    """Event files in `tensorboard/` of the run folder; the stage is the first part of a scalar's name."""

    def __init__(self, run_folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._events = SummaryWriter(str(run_folder / "tensorboard"))

    def write(self, stage: str, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Int64]) -> None:
        """Raises OSError, which names the folder, where the disk refused, now or at an earlier step."""
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
        """TensorBoard's own thread writes, and hands on its errors without a place."""
        try:
            yield
        except OSError as error:
            error.filename = self._events.get_logdir()
            raise


class OnlineTracker:
    """Weights & Biases or trackio. Every stage is a run of its own in the group of the whole run, so that the arms of a
    recipe can be laid over one another; a resumed stage goes on in its run.

    Where that is kept, and whether it leaves this machine, their own settings say (`WANDB_MODE=offline` keeps it in the
    run folder, `TRACKIO_DIR` is trackio's folder). Steps of Weights & Biases only grow: of steps that a resumed stage
    takes again, those of its first life stay.
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
