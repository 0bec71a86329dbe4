"""Evaluation of checkpoints on the held-out examples of a task, through the engine that also made the rollouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from actors.engine.checks import check_machine
from buffer.custom import check_trusted
from buffer.settings import CustomSettings
from launch.errors import UserError, setting_up
from launch.evaluation.mauve_score import KMEANS_STARTS, RESAMPLES, check_mauve, mauve_scorer
from launch.evaluation.results import HELD_OUT, CheckpointResult, Evaluation, ShownRollout, Target
from launch.evaluation.rollout_metrics import ReplayedRollouts, answer_metrics, text_metrics
from launch.evaluation.rollouts import KeptRollouts, make_rollouts, plan_groups, recovery_obstacle
from launch.generation import open_checkpoint, progress_bar
from launch.rollout_view import view_rollout
from launch.run_folder.checkpoints import CHECKPOINTS_FOLDER, run_of
from launch.run_folder.folder import run_config
from launch.settings.evaluation import RECOVERY, SAMPLED
from launch.settings.recipe import read_recipe
from launch.settings.run import RunSettings
from launch.statistics import Estimate

if TYPE_CHECKING:
    from datasets import Dataset

    from buffer.experts.ragged import Ragged
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

    rollout, asked = settings.actors.rollout, settings.evaluation.mauve
    with console.status("loading the task"), setting_up():
        check_machine(enforce_eager=True)
        if isinstance(settings.task, CustomSettings):
            check_trusted(settings.task, "task")
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
        examples = task.held_out_examples(settings.evaluation.examples, settings.seed)
        check_evaluation(settings, task)
        groups = plan_groups(task, first.contract, examples, rollout, settings.evaluation, settings.seed)
        longest = max(len(prompt) for prompt in groups[0].prompts) + rollout.max_new_tokens
    contract, max_length = first.contract, min(longest, first.max_length)
    kept = KeptRollouts(keep_in, console)
    batches = make_rollouts(checkpoints, groups, task.name, max_length, settings.seed, kept, console)
    results = []
    mauve: Callable[[Ragged], Estimate] | None = None
    with progress_bar(console, "measuring", len(targets)) as advance:
        for label, folder in targets:
            made = {name: ReplayedRollouts.of(batch, contract) for name, batch in batches[label].items()}
            if task.is_correct is not None:
                numbers = {
                    each.name: answer_metrics(made[each.name], examples, task, each.num_forced) for each in groups
                }
            else:
                from launch.evaluation.learner_model import held_out_metrics, load_for_evaluation

                model = load_for_evaluation(checkpoints[label])
                if asked is not None and mauve is None:  # the features are those of the first checkpoint, for all
                    mauve = mauve_scorer(examples, task, asked, rollout.max_new_tokens, settings.seed, model)
                numbers = {each.name: text_metrics(made[each.name], each.num_forced) for each in groups}
                if mauve is not None:
                    for name, found in numbers.items():
                        found["mauve"] = mauve(made[name].texts)
                numbers[HELD_OUT] = held_out_metrics(model, examples, contract, checkpoints[label].max_length)
            results.append(CheckpointResult(label, folder, numbers, _shown(made, examples, task, settings)))
            advance(1)
    conditions: dict[str, object] = {name: getattr(rollout, name) for name in ("max_new_tokens", "max_actions")}
    if asked is not None:
        conditions["mauve"] = {**asked.model_dump(), "kmeans_starts": KMEANS_STARTS, "resamples": RESAMPLES}
    left_out = _left_out(settings, task, recovery_obstacle(task, contract, examples, rollout))
    return Evaluation.of(task.name, len(examples), settings.seed, results, conditions, left_out)


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
    """Rollouts as they came, those that take tokens back first; to choose by right or wrong would flatter."""
    count = settings.evaluation.shown_rollouts
    after_mistake = count // 2 if RECOVERY in rollouts else 0
    shown = []
    for group, number in ((SAMPLED, count - after_mistake), (RECOVERY, after_mistake)):
        if number == 0:
            continue
        found = rollouts[group]
        backspaces = found.trajectories.actions == found.contract.backspace_id
        deletes = np.isin(np.arange(found.trajectories.num_trajectories), found.played.trajectory[backspaces])
        texts = found.decoded(task)
        for index in np.argsort(~deletes, kind="stable")[:number].tolist():
            view = view_rollout(found.batch, index, task.tokenizer, found.contract, num_forced=int(group == RECOVERY))
            is_correct = None
            if task.is_correct is not None:
                is_correct = view.finish_reason == "eos" and task.is_correct(texts[index], examples[index])
            shown.append(ShownRollout(group, view, is_correct))
    return tuple(shown)


def settings_for(checkpoint: Path, task_from: Path | None, overrides: Sequence[str] = ()) -> RunSettings:
    """Settings of a run folder or a recipe; by default of the run that the checkpoint lies in, else UserError."""
    if task_from is not None:
        return read_recipe(run_config(task_from) if task_from.is_dir() else task_from, overrides)
    if not checkpoint.is_dir():
        raise UserError(f"no checkpoint at {checkpoint}")
    run = run_of(checkpoint)
    if run is None:
        raise UserError(f"{checkpoint} does not lie in a run folder: name its task with --task-from RUN or RECIPE")
    return read_recipe(run_config(run), overrides)


def labeled(checkpoints: Sequence[Path]) -> list[Target]:
    """Targets with labels as short as tells them apart, at most the paths; UserError where one is named twice."""
    folders = [checkpoint.resolve() for checkpoint in checkpoints]
    names = []
    for folder in folders:
        *_, run, kind, stage, step = ("", "", "", *folder.parts)
        names.append((run, stage, step) if kind == CHECKPOINTS_FOLDER else ("", step, step))
    for template in ("{1}", "{1}/{2}", "{0}", "{0}/{1}", "{0}/{1}/{2}", "{3}"):
        labels = [template.format(*each, folder) for each, folder in zip(names, folders, strict=True)]
        if len(set(labels)) == len(labels):
            return [Target(*pair) for pair in zip(labels, checkpoints, strict=True)]
    raise UserError("the same checkpoint is named twice")
