"""Evaluation of checkpoints on the held-out examples of a task, through the engine that also made the rollouts.

`launch.evaluation.arms` says which rollouts there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from rich.console import Console

from actors.engine.machine import check_machine
from buffer.trajectory.schema import TokenContract
from launch.errors import UserError
from launch.evaluation.answer_metrics import answer_texts
from launch.evaluation.arms import plan_arms, recovery_obstacle
from launch.evaluation.kept_rollouts import KeptRollouts
from launch.evaluation.mauve_score import KMEANS_STARTS, RESAMPLES
from launch.evaluation.measuring import check_evaluation, measure
from launch.evaluation.results import CheckpointResult, Evaluation, ShownRollout, Target
from launch.evaluation.rollouts import RolloutPlan, Rollouts, make_rollouts
from launch.generation import Checkpoint, open_checkpoint
from launch.rollout_view import view_rollout
from launch.settings.decodings import RECOVERY, SAMPLED
from launch.settings.run import RunSettings

if TYPE_CHECKING:
    from datasets import Dataset

    from buffer.experts.tasks import Task


def evaluate(
    targets: Sequence[Target], settings: RunSettings, console: Console, keep_in: Path | None = None
) -> Evaluation:
    """Evaluate checkpoints of one model on up to `settings.evaluation.examples` held-out examples.

    Args:
        targets: the first is the baseline of the differences.
        keep_in: folder in which rollouts are kept, and looked for: an evaluation that was interrupted goes on there.

    Raises:
        UserError: the machine lacks what an engine needs, a folder is no checkpoint, the task does not fit the model,
            the checkpoints are of different models, or there are too few texts for MAUVE.
    """
    with console.status("loading the task"):
        try:
            check_machine(enforce_eager=True)
            checkpoints = [open_checkpoint(target.checkpoint) for target in targets]
            _check_same_tokens(checkpoints)
            task = _load_task(settings, checkpoints[0])
            examples = task.held_out.shuffle(seed=settings.seed)
            examples = examples.select(range(min(settings.evaluation.examples, len(examples))))
            check_evaluation(settings, task)
            rollout = settings.actors.rollout
            arms = plan_arms(task, checkpoints[0].contract, examples, rollout, settings.evaluation, settings.seed)
        except (ValueError, OSError, ImportError) as error:
            raise UserError(str(error)) from None
        obstacle = recovery_obstacle(task, checkpoints[0].contract, examples, rollout)
        longest = max(len(prompt) for prompt in arms[0].group.prompts) + rollout.max_new_tokens
    plan = RolloutPlan(
        arms,
        task.name,
        min(longest, checkpoints[0].max_length),
        settings.seed,
        None if keep_in is None else KeptRollouts(keep_in, lambda path: _tell_damaged(path, console)),
    )
    found = make_rollouts(targets, checkpoints, plan, console)
    metrics = measure(targets, checkpoints, found, plan, examples, task, settings, console)
    results = [
        CheckpointResult(
            target.label,
            target.checkpoint,
            numbers,
            tuple(_shown(rollouts, examples, task, checkpoints[0].contract, settings.evaluation.shown_rollouts)),
        )
        for target, rollouts, numbers in zip(targets, found, metrics, strict=True)
    ]
    return Evaluation(
        task.name,
        task.is_correct is not None,
        len(examples),
        settings.seed,
        tuple(results),
        conditions=_conditions(settings),
        left_out=_left_out(settings, task, obstacle),
    )


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
            raise ValueError(
                f"{other.folder} and {first.folder} have different tokenizers (or another backspace): what they make "
                "of a text is not comparable token by token; evaluate them apart"
            )


def _tell_damaged(path: Path, console: Console) -> None:
    console.print(f"rollouts kept in {path} are damaged: they are made anew", highlight=False, soft_wrap=True)


def _conditions(settings: RunSettings) -> dict[str, object]:
    rollout, mauve = settings.actors.rollout, settings.evaluation.mauve
    conditions: dict[str, object] = {"max_new_tokens": rollout.max_new_tokens, "max_actions": rollout.max_actions}
    if mauve is not None:
        conditions["mauve"] = {**mauve.model_dump(), "kmeans_starts": KMEANS_STARTS, "resamples": RESAMPLES}
    return conditions


def _left_out(settings: RunSettings, task: Task, recovery_obstacle: str | None) -> dict[str, str]:
    """What is not measured, and why."""
    left_out = {} if recovery_obstacle is None else {"recovery": recovery_obstacle}
    if task.is_correct is None:
        left_out["accuracy, wrong and right tokens taken back"] = f"task {task.name} has no check of answers"
        if settings.evaluation.mauve is None:
            left_out["mauve"] = "not asked for: --mauve encoder, or evaluation.mauve in the recipe"
    else:
        left_out["mauve, self-BLEU, diversity, perplexity"] = f"answers of task {task.name} are right or wrong"
    if not settings.actors.rollout.backspace:
        left_out["taking back"] = "actors.rollout.backspace is off"
    return left_out


def _shown(
    rollouts: Rollouts, examples: Dataset, task: Task, contract: TokenContract, count: int
) -> list[ShownRollout]:
    if RECOVERY not in rollouts:
        return _show(SAMPLED, rollouts[SAMPLED], examples, task, contract, count)
    shown = _show(SAMPLED, rollouts[SAMPLED], examples, task, contract, count - count // 2)
    return shown + _show(RECOVERY, rollouts[RECOVERY], examples, task, contract, count // 2)


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
