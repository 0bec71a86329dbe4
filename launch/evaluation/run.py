"""Evaluation of checkpoints on the held-out examples of a task, through the engine that also made the rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from actors.engine.checks import check_machine
from launch.errors import UserError
from launch.evaluation.mauve_score import KMEANS_STARTS, RESAMPLES, MauveReference, check_mauve
from launch.evaluation.results import HELD_OUT, CheckpointResult, Evaluation, Metrics, ShownRollout, Target
from launch.evaluation.rollout_groups import RolloutGroup, plan_groups, recovery_obstacle
from launch.evaluation.rollout_metrics import ReplayedRollouts, answer_metrics, text_metrics
from launch.evaluation.rollouts import KeptRollouts, load_for_evaluation, make_rollouts
from launch.generation import Checkpoint, open_checkpoint, progress_bar
from launch.rollout_view import view_rollout
from launch.settings.evaluation import RECOVERY, SAMPLED
from launch.settings.run import RunSettings

if TYPE_CHECKING:
    from datasets import Dataset

    from buffer.experts.tasks import Task


def check_evaluation(settings: RunSettings, task: Task) -> None:
    """Refuse what an evaluation on this task could not measure, before it is trained for (see `check_mauve`)."""
    check_mauve(settings.evaluation.mauve, task, min(settings.evaluation.examples, len(task.held_out)))


def evaluate(
    targets: Sequence[Target], settings: RunSettings, console: Console, keep_in: Path | None = None
) -> Evaluation:
    """Evaluate checkpoints of one model on up to `settings.evaluation.examples` held-out examples.

    targets: the first is the baseline of the differences. keep_in: folder in which rollouts are kept, and looked for:
    an evaluation that was interrupted goes on there. Raises UserError where the machine lacks what an engine needs, or
    checkpoints, task and settings do not fit together.
    """
    import datasets

    from buffer.experts.tasks import load_task

    rollout = settings.actors.rollout
    with console.status("loading the task"):
        try:
            check_machine(enforce_eager=True)
            checkpoints = {target.label: open_checkpoint(target.checkpoint) for target in targets}
            first, *others = checkpoints.values()
            for other in others:
                if other.contract != first.contract:
                    raise ValueError(
                        f"{other.folder} and {first.folder} have different tokenizers (or another backspace): what "
                        "they make of a text is not comparable token by token; evaluate them apart"
                    )
            datasets.disable_progress_bars()  # they would tear the command's own display
            backspace_id = first.contract.backspace_id
            task = load_task(settings.task, first.tokenizer, backspace_id=backspace_id, max_length=first.max_length)
            examples = task.held_out.shuffle(seed=settings.seed)
            examples = examples.select(range(min(settings.evaluation.examples, len(examples))))
            check_evaluation(settings, task)
            groups = plan_groups(task, first.contract, examples, rollout, settings.evaluation, settings.seed)
        except (ValueError, OSError, ImportError) as error:
            raise UserError(str(error)) from None
        obstacle = recovery_obstacle(task, first.contract, examples, rollout)
        longest = max(len(prompt) for prompt in groups[0].group.prompts) + rollout.max_new_tokens

    def say_damaged(path: Path) -> None:
        console.print(f"rollouts kept in {path} are damaged: they are made anew", highlight=False, soft_wrap=True)

    kept = None if keep_in is None else KeptRollouts(keep_in, say_damaged)
    max_length = min(longest, first.max_length)
    batches = make_rollouts(checkpoints, groups, task.name, max_length, settings.seed, kept, console)
    rollouts = {
        label: {name: ReplayedRollouts.of(batch, first.contract) for name, batch in found.items()}
        for label, found in batches.items()
    }
    if task.is_correct is not None:
        numbers: Mapping[str, Metrics] = {
            label: {each.name: answer_metrics(found[each.name], examples, task, each.num_forced) for each in groups}
            for label, found in rollouts.items()
        }
    else:
        numbers = _measure_texts(checkpoints, rollouts, groups, examples, task, settings, console)
    shown = {label: _shown(found, examples, task, settings) for label, found in rollouts.items()}
    conditions: dict[str, object] = {name: getattr(rollout, name) for name in ("max_new_tokens", "max_actions")}
    if (mauve := settings.evaluation.mauve) is not None:
        conditions["mauve"] = {**mauve.model_dump(), "kmeans_starts": KMEANS_STARTS, "resamples": RESAMPLES}
    results = [CheckpointResult(*target, numbers[target.label], shown[target.label]) for target in targets]
    left_out = _left_out(settings, task, obstacle)
    return Evaluation.of(task.name, len(examples), settings.seed, results, conditions, left_out)


def _measure_texts(
    checkpoints: Mapping[str, Checkpoint],
    rollouts: Mapping[str, Mapping[str, ReplayedRollouts]],
    groups: Sequence[RolloutGroup],
    examples: Dataset,
    task: Task,
    settings: RunSettings,
    console: Console,
) -> Mapping[str, Metrics]:
    """The numbers of every checkpoint, by its label."""
    from launch.evaluation.held_out import held_out_metrics

    found: dict[str, Metrics] = {}
    mauve, asked = None, settings.evaluation.mauve
    with progress_bar(console, "measuring", len(checkpoints) * (len(groups) + 1)) as advance:
        for label, checkpoint in checkpoints.items():
            model = load_for_evaluation(checkpoint)
            if asked is not None and mauve is None:  # the features are those of the first checkpoint, for all
                max_tokens = settings.actors.rollout.max_new_tokens
                encoder = model if asked.features == "model" else None
                mauve = MauveReference.of(examples, task, asked, max_tokens, settings.seed, encoder)
            numbers = {}
            for group in groups:
                made = rollouts[label][group.name]
                numbers[group.name] = text_metrics(made, group.num_forced)
                if mauve is not None:
                    numbers[group.name]["mauve"] = mauve.score(made.texts)
                advance(1)
            numbers[HELD_OUT] = held_out_metrics(model, examples, checkpoint.contract, checkpoint.max_length)
            found[label] = numbers
            advance(1)
    return found


def _left_out(settings: RunSettings, task: Task, obstacle: str | None) -> dict[str, str]:
    """What is not measured, and why."""
    left_out = {} if obstacle is None else {"recovery": obstacle}
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
    rollouts: Mapping[str, ReplayedRollouts], examples: Dataset, task: Task, settings: RunSettings
) -> tuple[ShownRollout, ...]:
    """Rollouts as they came, those that take tokens back before the others; right or wrong is no criterion: that would
    flatter.
    """
    count = settings.evaluation.shown_rollouts
    after_mistake = count // 2 if RECOVERY in rollouts else 0
    shown = []
    for group, number in ((SAMPLED, count - after_mistake), (RECOVERY, after_mistake)):
        if number == 0:
            continue
        found = rollouts[group]
        deletes = np.zeros(found.logs.num_logs, dtype=np.bool_)
        deletes[found.played.log[found.logs.actions == found.contract.backspace_id]] = True
        texts = found.decoded(task)
        for index in np.argsort(~deletes, kind="stable")[:number].tolist():
            view = view_rollout(found.batch, index, task.tokenizer, found.contract, num_planted=int(group == RECOVERY))
            is_correct = None
            if task.is_correct is not None:
                is_correct = view.finish_reason == "eos" and task.is_correct(texts[index], examples[index])
            shown.append(ShownRollout(group, view, is_correct))
    return tuple(shown)
