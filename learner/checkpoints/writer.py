"""Writing the checkpoints of the stage under way beside training, one at a time; an error comes to light at the next
step. All ranks take part in a snapshot, rank 0 writes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from types import MappingProxyType, TracebackType
from typing import Self

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from learner.checkpoints.checkpoint import Snapshot, TrainingState, take_snapshot
from learner.checkpoints.store import CheckpointStore, Progress, remove_superseded, step_name
from learner.ranks import Ranks, all_finite
from learner.settings.held_out import HELD_OUT_LOSS
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

    def submit(self, snapshot: Snapshot) -> None:
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

    def _write(self, snapshot: Snapshot) -> None:
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
                f"checkpoint {self._place()} could not be written: {type(error).__name__}: {error}; free space or give "
                f"permission there, then resume the run from {newest}"
            ) from error
        self._under_way = None
        self._newest_step = progress.step
        self._on_durable(progress)
        return True

    def _place(self) -> str:
        assert self._under_way is not None
        return self._store.location(self._under_way[0].step)


class StageCheckpoints(CheckpointWriter):
    """Saves one stage; every rank calls the same methods in the same order. Ranks other than 0 write nothing."""

    def __init__(
        self,
        ranks: Ranks,
        store: CheckpointStore,
        settings: LearnerSettings,
        start: Progress,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        on_durable: Callable[[Progress], None],
    ) -> None:
        """start: of the stage; each checkpoint has its own step, versions, metrics and expert position. on_durable: see
        `CheckpointWriter`; called at rank 0."""
        super().__init__(store, settings, on_durable)
        self._ranks = ranks
        self._start = start
        self._model = model
        self._tokenizer = tokenizer
        self._saved_step = self._newest_step  # where the stage goes on
        self._steps = 0  # since the checkpoint before
        self._metric_sums: dict[str, float] = {}

    def after_step(self, metrics: Mapping[str, float]) -> None:
        """Take note of a step, and of a write that has ended. ValueError: the step lacks the metric that says which
        checkpoint is best. Else it raises as `poll`."""
        best = self._settings.checkpoint_best_metric
        if best is not None and best != HELD_OUT_LOSS and best not in metrics:
            names = ", ".join(sorted(metrics))
            raise ValueError(f"learner.checkpoint_best_metric={best} is no metric of this stage; it has: {names}")
        self._steps += 1
        for name, value in metrics.items():
            self._metric_sums[name] = self._metric_sums.get(name, 0.0) + value
        self.poll()

    def save(
        self,
        step: int,
        state: Callable[[], TrainingState],
        expert_position: dict[str, int],
        policy_version: int,
        held_out: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Begin to write a checkpoint of now, unless there is one of this step already; waits for the one before.
        state: gives what the next step depends on besides the weights; called at every rank. held_out: see
        `Progress`. Raises as `CheckpointWriter.wait`, and FloatingPointError where the weights are not finite, so
        the checkpoint before is the last good one."""
        if self._saved_step == step:
            return
        if not all_finite(self._model, self._ranks):
            raise FloatingPointError(
                f"step {step}: training has diverged; the weights are not finite and are not saved. Lower "
                f"stages.{self._start.stage}.optimizer.learning_rate, then resume the run from the checkpoint before"
            )
        self._saved_step = step
        training_state = state()
        self.wait()  # before the copy: no more than one snapshot is in memory
        progress = replace(
            self._start,
            step=step,
            policy_version=policy_version,
            expert_stream=expert_position,
            metrics={name: total / self._steps for name, total in self._metric_sums.items() if math.isfinite(total)}
            | ({HELD_OUT_LOSS: held_out[HELD_OUT_LOSS]} if held_out.get(f"{HELD_OUT_LOSS}_step") == step else {}),
            held_out=dict(held_out),
        )
        self._steps, self._metric_sums = 0, {}
        snapshot = take_snapshot(self._model, self._tokenizer, progress, training_state, keep=self._ranks.leads)
        if self._ranks.leads:
            self.submit(snapshot)
