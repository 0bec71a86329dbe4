"""Evaluation of checkpoints on the held-out examples of a task, through the engine that also made the rollouts.

Three groups of rollouts for a task with right answers, one (`sampled`) for a text task:

greedy     the most likely action each time. A token that was taken back is not offered there again, else a greedy
           policy that rejects its own choice would go round in circles.
sampled    temperature 1, as in training.
recovery   greedy, after a planted wrong first token: only an answer that takes it back can be right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from rich.console import Console

from actors.engine_settings import SamplingSettings
from actors.generator import Generator, PromptGroup
from actors.settings import RolloutSettings
from buffer.schema import TokenContract
from launch.errors import UserError
from launch.evaluation.answer_metrics import (
    answer_metrics,
    answer_texts,
    plant_wrong_first_tokens,
    recovery_metrics,
)
from launch.evaluation.results import GREEDY, RECOVERY, SAMPLED, CheckpointResult, Evaluation, ShownRollout, Target
from launch.evaluation.text_metrics import text_metrics
from launch.generation import Checkpoint, open_checkpoint, progress_bar, running_generator
from launch.rollout_view import view_rollout
from launch.settings import RunSettings

if TYPE_CHECKING:
    from datasets import Dataset

    from buffer.experts.tasks import Task


def evaluate(targets: Sequence[Target], settings: RunSettings, console: Console) -> Evaluation:
    """Evaluate checkpoints of one model on up to `settings.evaluation.examples` held-out examples.

    Raises:
        UserError: a folder is no checkpoint, the task does not fit the model, or the checkpoints are of different
            models.
    """
    with console.status("loading the task"):
        try:
            checkpoints = [open_checkpoint(target.checkpoint) for target in targets]
            task = _load_task(settings, checkpoints[0])
        except (ValueError, OSError, ImportError) as error:
            raise UserError(str(error)) from None
        _check_same_tokens(checkpoints)
        examples = task.held_out.shuffle(seed=settings.seed)
        examples = examples.select(range(min(settings.evaluation.examples, len(examples))))
        groups = prompt_groups(task, checkpoints[0].contract, examples, settings.actors.rollout, settings.seed)
        longest = max(len(prompt) for prompt in groups[SAMPLED].prompts) + settings.actors.rollout.max_new_tokens
    shown = settings.evaluation.shown_rollouts
    results = []
    with running_generator(checkpoints[0], longest, settings.seed) as generator:
        for target, checkpoint in zip(targets, checkpoints, strict=True):
            try:
                generator.load(checkpoint.folder)
            except ValueError as error:
                raise UserError(f"checkpoints of different models cannot be compared in one go: {error}") from None
            batches = _generate(generator, groups, task, target.label, console)
            results.append(_measure(target, batches, examples, task, checkpoint.contract, shown))
    return Evaluation(task.name, task.is_correct is not None, len(examples), settings.seed, tuple(results))


def prompt_groups(
    task: Task, contract: TokenContract, examples: Dataset, rollout: RolloutSettings, seed: int
) -> dict[str, PromptGroup]:
    """The groups of the module's description; only `sampled` for a task without right answers."""
    prompts = [np.asarray(ids, dtype=np.int32) for ids in examples["prompt_ids"]]

    def sampling(temperature: float) -> SamplingSettings:
        return SamplingSettings(
            max_new_tokens=rollout.max_new_tokens,
            max_actions=rollout.max_actions,
            temperature=temperature,
            backspace=rollout.backspace,
            ban_deleted=rollout.backspace and temperature == 0.0,
        )

    groups = {SAMPLED: PromptGroup(prompts, sampling(1.0))}
    if task.is_correct is None:
        return groups
    planted = plant_wrong_first_tokens(examples, task.task_noise, contract, np.random.default_rng(seed))
    groups[GREEDY] = PromptGroup(prompts, sampling(0.0))
    groups[RECOVERY] = PromptGroup(prompts, sampling(0.0), planted=[[token] for token in planted.tolist()])
    return groups


def _load_task(settings: RunSettings, checkpoint: Checkpoint) -> Task:
    import datasets

    from buffer.experts.tasks import load_task

    datasets.disable_progress_bars()  # they would tear the command's own display
    return load_task(
        settings.task,
        checkpoint.tokenizer,
        backspace_id=checkpoint.contract.backspace_id,
        max_length=checkpoint.max_length,
    )


def _check_same_tokens(checkpoints: Sequence[Checkpoint]) -> None:
    first = checkpoints[0]
    for other in checkpoints[1:]:
        if other.contract != first.contract:
            raise UserError(
                f"{other.folder} and {first.folder} are of models with different vocabularies: evaluate them apart"
            )


def _generate(
    generator: Generator, groups: dict[str, PromptGroup], task: Task, label: str, console: Console
) -> dict[str, pa.RecordBatch]:
    total = sum(len(group.prompts) for group in groups.values())
    with progress_bar(console, f"evaluating {label}", total) as advance:
        return generator.generate(groups, task.name, advance)


def _measure(
    target: Target,
    batches: dict[str, pa.RecordBatch],
    examples: Dataset,
    task: Task,
    contract: TokenContract,
    shown: int,
) -> CheckpointResult:
    if task.is_correct is None:
        metrics = {SAMPLED: text_metrics(batches[SAMPLED], contract)}
        rollouts = _show(SAMPLED, batches[SAMPLED], examples, task, contract, shown)
    else:
        metrics = {group: answer_metrics(batches[group], examples, task, contract) for group in (GREEDY, SAMPLED)}
        metrics[RECOVERY] = recovery_metrics(batches[RECOVERY], examples, task, contract)
        rollouts = _show(SAMPLED, batches[SAMPLED], examples, task, contract, shown - shown // 2)
        rollouts += _show(RECOVERY, batches[RECOVERY], examples, task, contract, shown // 2)
    return CheckpointResult(target.label, target.checkpoint, metrics, tuple(rollouts))


def _show(
    group: str, batch: pa.RecordBatch, examples: Dataset, task: Task, contract: TokenContract, count: int
) -> list[ShownRollout]:
    """`count` rollouts of a batch as they came, those that take tokens back before the others; right or wrong is no
    criterion: that would flatter.
    """
    log_of_action = np.repeat(np.arange(batch.num_rows), batch.column("actions").value_lengths().to_numpy())
    deletes = np.zeros(batch.num_rows, dtype=np.bool_)
    deletes[log_of_action[batch.column("actions").flatten().to_numpy() == contract.backspace_id]] = True
    answers = answer_texts(batch, task, contract)
    shown = []
    for index in np.argsort(~deletes, kind="stable")[:count].tolist():
        view = view_rollout(batch, index, task.tokenizer, contract, num_planted=1 if group == RECOVERY else 0)
        is_correct = None
        if task.is_correct is not None:
            is_correct = view.finish_reason == "eos" and task.is_correct(answers[index], examples[index])
        shown.append(ShownRollout(group, view, is_correct))
    return shown
