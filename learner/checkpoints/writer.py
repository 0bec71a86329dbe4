"""Writing checkpoints beside training: one at a time, with errors that come to light at the next step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Self

from learner.checkpoints.checkpoint import CheckpointSnapshot
from learner.checkpoints.store import CheckpointStore, Progress, remove_superseded, step_name
from learner.settings.stages import LearnerSettings


class CheckpointWriteError(RuntimeError):
    """A checkpoint could not be written."""


class CheckpointWriter:
    """Writes the checkpoints of one stage in a thread of its own; at most one snapshot is in memory beside the model.
    A context manager, so that a stage that fails still gets its last checkpoint whole."""

    def __init__(
        self, store: CheckpointStore, settings: LearnerSettings, on_durable: Callable[[Progress], None]
    ) -> None:
        """on_durable: called in the thread of `poll`, `submit` or `wait`, once for each finished write."""
        self._store = store
        self._settings = settings
        self._on_durable = on_durable
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._newest_step = max(store.steps(), default=None)
        self._under_way: tuple[Progress, Future[None]] | None = None

    def submit(self, snapshot: CheckpointSnapshot) -> None:
        """Begin to write `snapshot`, after the write before has ended; raises as `wait`."""
        self.wait()
        self._under_way = snapshot.progress, self._thread.submit(self._write, snapshot)

    def poll(self) -> None:
        """Take note of a write that has ended, without waiting; call it at every step. CheckpointWriteError: it failed;
        says where, why, and from which step the run can be resumed."""
        self._settle(0.0)

    def wait(self) -> None:
        """Wait for the write under way, if any; raises as `poll`, or TimeoutError: it did not end in time."""
        timeout_s = self._settings.checkpoint_timeout_s
        if not self._settle(timeout_s):
            raise TimeoutError(
                f"waited {timeout_s:g} s for the checkpoint {self._place()} to be written: is the storage slow, or "
                "learner.checkpoint_timeout_s too short?"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._under_way is not None:
            _, future = self._under_way
            ended = wait([future], timeout=self._settings.checkpoint_timeout_s).done
            if ended and error is not None and future.exception() is not None:
                error.add_note(f"checkpoint {self._place()} could not be written either: {future.exception()}")
        self._thread.shutdown(wait=False)

    def _write(self, snapshot: CheckpointSnapshot) -> None:
        self._store.write(snapshot.progress.step, snapshot.write)
        remove_superseded(self._store, self._settings.keep_checkpoints, self._settings.checkpoint_best_metric)

    def _settle(self, timeout_s: float) -> bool:
        """Whether no write is under way any more."""
        if self._under_way is None:
            return True
        progress, future = self._under_way
        if not wait([future], timeout=timeout_s).done:
            return False
        error = future.exception()
        if error is not None:
            newest = "the start of the stage" if self._newest_step is None else step_name(self._newest_step)
            raise CheckpointWriteError(
                f"checkpoint {self._place()} could not be written: {type(error).__name__}: {error}; make room or give "
                f"permission there, then resume the run from {newest}"
            ) from error
        self._under_way = None
        self._newest_step = progress.step
        self._on_durable(progress)
        return True

    def _place(self) -> str:
        assert self._under_way is not None
        return self._store.location(self._under_way[0].step)


class MetricMeans:
    """Mean of each metric over the steps since the last checkpoint."""

    def __init__(self, needed: str | None) -> None:
        """needed: a metric that every step must have."""
        self._needed = needed
        self._sums: dict[str, float] = {}
        self._steps = 0

    def add(self, metrics: Mapping[str, float]) -> None:
        """One step. ValueError: it lacks the metric that is needed."""
        if self._needed is not None and self._needed not in metrics:
            names = ", ".join(sorted(metrics))
            raise ValueError(
                f"learner.checkpoint_best_metric={self._needed} is no metric of this stage; it has: {names}"
            )
        self._steps += 1
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def take(self) -> dict[str, float]:
        """The means, finite ones only; the next ones start from here."""
        means = {name: total / self._steps for name, total in self._sums.items() if math.isfinite(total)}
        self._sums, self._steps = {}, 0
        return means
