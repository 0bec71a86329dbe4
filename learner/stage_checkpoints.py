"""The checkpoints of the stage under way: all ranks take part in a snapshot, rank 0 writes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from learner.checkpoints.checkpoint import take_snapshot
from learner.checkpoints.model_files import snapshot_model
from learner.checkpoints.store import CheckpointStore, Progress
from learner.checkpoints.writer import CheckpointWriter, MetricMeans
from learner.ranks.group import Ranks
from learner.ranks.sharding import all_finite
from learner.settings.stages import LearnerSettings
from learner.trainer import Trainer


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
        saved_step: int | None = None,
    ) -> None:
        """Args:
        start: of the stage; each checkpoint has its own step, versions, metrics and expert position. on_durable: see
            `CheckpointWriter`; called at rank 0. saved_step: the stage goes on from the checkpoint of this step, which
            is not written again.
        """
        super().__init__(store, settings, on_durable)
        self._ranks = ranks
        self._start = start
        self._model = model
        self._tokenizer = tokenizer
        self._means = MetricMeans(settings.checkpoint_best_metric)
        self._saved_step = saved_step

    def after_step(self, metrics: dict[str, float]) -> None:
        """Take note of a step, and of a write that has ended; raises as `MetricMeans.add` and `poll`."""
        self._means.add(metrics)
        self.poll()

    def save(self, trainer: Trainer, expert_position: dict[str, int], policy_version: int) -> None:
        """Begin to write a checkpoint of now, unless there is one of this step already; waits for the one before.

        Raises:
            FloatingPointError: the weights are not finite, so the checkpoint before is the last good one. Else see
                `CheckpointWriter.wait`.
        """
        if self._saved_step == trainer.step:
            return
        if not all_finite(self._model, self._ranks):
            raise FloatingPointError(
                f"step {trainer.step}: training has diverged; the weights are not finite and are not saved. Lower "
                f"stages.{self._start.stage}.optimizer.learning_rate, then resume the run from the checkpoint before"
            )
        self._saved_step = trainer.step
        state = trainer.state()
        if not self._ranks.leads:
            snapshot_model(self._model, keep=False)
            return
        self.wait()  # before the copy: no more than one snapshot is in memory
        progress = replace(
            self._start,
            step=trainer.step,
            policy_version=policy_version,
            expert_stream=expert_position,
            metrics=self._means.take(),
        )
        self.submit(take_snapshot(self._model, self._tokenizer, progress, state))
