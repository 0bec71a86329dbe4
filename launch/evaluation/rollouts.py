"""The rollouts of an evaluation: what is kept from an interrupted one, the rest from the engine or the search."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
from rich.console import Console

from actors.generator import Generator
from launch.errors import UserError
from launch.evaluation.arms import Arm
from launch.evaluation.kept_rollouts import KeptRollouts, rollouts_key, weights_digest
from launch.evaluation.results import Target
from launch.generation import Checkpoint, library_chatter_held, progress_bar, running_generator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rollouts = dict[str, pa.RecordBatch]
"""Of one checkpoint, by arm."""


@dataclass(frozen=True)
class RolloutPlan:
    """What is generated of every checkpoint. max_length: longest text with its prompt, in tokens."""

    arms: Sequence[Arm]
    task: str
    max_length: int
    seed: int
    kept: KeptRollouts | None


def make_rollouts(
    targets: Sequence[Target], checkpoints: Sequence[Checkpoint], plan: RolloutPlan, console: Console
) -> list[Rollouts]:
    """The rollouts of every checkpoint. Each group starts with the noise of the seed, whatever was made before it.

    Raises:
        UserError: the checkpoints are of different models.
    """
    jobs = [_Job(*pair, plan) for pair in zip(targets, checkpoints, strict=True)]
    if any(job.missing(searched=False) for job in jobs):
        with running_generator(checkpoints[0], plan.max_length, plan.seed) as generator:
            for job in jobs:
                arms = job.missing(searched=False)
                with _bar(arms, job.target, console) as advance:
                    for arm in arms:
                        _load(generator, job.checkpoint)  # starts the noise anew, too
                        job.take(arm, generator.generate({arm.name: arm.group}, plan.task, advance)[arm.name])
    for job in jobs:
        if arms := job.missing(searched=True):
            from launch.evaluation.contrastive import contrastive_rollouts

            model = load_for_evaluation(job.checkpoint)
            with _bar(arms, job.target, console) as advance:
                for arm in arms:
                    job.take(
                        arm,
                        contrastive_rollouts(model, arm, job.checkpoint.contract, plan.max_length, plan.task, advance),
                    )
    return [job.rollouts for job in jobs]


class _Job:
    """A checkpoint, what there is of its rollouts, and where to keep the others."""

    def __init__(self, target: Target, checkpoint: Checkpoint, plan: RolloutPlan) -> None:
        self.target = target
        self.checkpoint = checkpoint
        self.rollouts: Rollouts = {}
        self._plan = plan
        self._keys: dict[str, str] = {}
        if plan.kept is None:
            return
        weights = weights_digest(checkpoint.folder)
        for arm in plan.arms:
            key = rollouts_key(weights, arm, checkpoint.contract, plan.max_length, plan.seed)
            self._keys[arm.name] = key
            batch = plan.kept.find(key)
            if batch is not None:
                self.rollouts[arm.name] = batch

    def missing(self, *, searched: bool) -> list[Arm]:
        """Arms without rollouts: those of the search, or those of the engine."""
        arms = [arm for arm in self._plan.arms if arm.name not in self.rollouts]
        return [arm for arm in arms if (arm.contrastive is not None) == searched]

    def take(self, arm: Arm, batch: pa.RecordBatch) -> None:
        """The rollouts of an arm are there."""
        self.rollouts[arm.name] = batch
        if self._plan.kept is not None:
            self._plan.kept.keep(self._keys[arm.name], batch)


def _load(generator: Generator, checkpoint: Checkpoint) -> None:
    try:
        generator.load(checkpoint.folder)
    except ValueError as error:
        raise UserError(f"checkpoints of different models cannot be compared in one go: {error}") from None


def load_for_evaluation(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model of a checkpoint in float32, as the learner loads it, on the GPU if there is one."""
    import torch

    from learner.model.policy import load_model
    from learner.settings.model import PretrainedModelSettings

    settings = PretrainedModelSettings(name=str(checkpoint.folder), dtype="float32")
    with library_chatter_held():
        model = load_model(settings, checkpoint.tokenizer)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def _bar(arms: Sequence[Arm], target: Target, console: Console) -> Iterator[Callable[[int], None]]:
    total = sum(len(arm.group.prompts) for arm in arms)
    with progress_bar(console, f"evaluating {target.label}", total) as advance:
        yield advance
