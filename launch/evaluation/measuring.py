"""From rollouts and models to numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from rich.console import Console

from buffer.experts.ragged import Ragged, index_ranges
from buffer.trajectory.replay import ActionLogs, replay
from launch.evaluation.answer_metrics import answer_metrics, recovery_metrics
from launch.evaluation.editing_metrics import final_texts
from launch.evaluation.mauve_score import check_mauve_installed, mauve_score
from launch.evaluation.results import HELD_OUT, Target
from launch.evaluation.rollouts import RolloutPlan, Rollouts, load_for_evaluation
from launch.evaluation.text_metrics import text_metrics
from launch.generation import Checkpoint, progress_bar
from launch.settings.evaluation import TEXTS_PER_CLUSTER, MauveSettings
from launch.settings.run import RunSettings
from launch.statistics import Estimate

if TYPE_CHECKING:
    from datasets import Dataset

    from buffer.experts.tasks import Task

Groups = dict[str, dict[str, Estimate]]
Features = npt.NDArray[np.float32]


def check_evaluation(settings: RunSettings, task: Task) -> None:
    """Refuse what an evaluation on this task could not measure, before it is trained for.

    Raises:
        ValueError, ImportError: see `check_mauve`.
    """
    check_mauve(settings.evaluation.mauve, task, min(settings.evaluation.examples, len(task.held_out)))


def check_mauve(settings: MauveSettings | None, task: Task, num_texts: int) -> None:
    """Refuse what cannot be measured before anything is generated.

    Raises:
        ValueError: the task has no free texts, or there are too few. ImportError: the extra is not installed.
    """
    if settings is None:
        return
    if task.is_correct is not None:
        raise ValueError(f"MAUVE compares free texts; answers of task {task.name} are right or wrong: leave it out")
    check_mauve_installed()
    if settings.features == "encoder":
        from launch.evaluation.features import encoder_folder

        encoder_folder()
    required, held_out, most = settings.required_texts, len(task.held_out), num_texts // TEXTS_PER_CLUSTER
    if num_texts < required:
        more = f"raise --examples to {required}" if held_out >= required else "raise task.held_out_fraction"
        fewer = f", or lower --mauve-clusters to {most}" if most >= 2 else ""
        raise ValueError(
            f"MAUVE with {settings.clusters} clusters needs {required} texts ({TEXTS_PER_CLUSTER} per cluster), and "
            f"this evaluation has {num_texts} of the {held_out} that the task holds out: {more}{fewer}"
        )


def measure(
    targets: Sequence[Target],
    checkpoints: Sequence[Checkpoint],
    rollouts: Sequence[Rollouts],
    plan: RolloutPlan,
    examples: Dataset,
    task: Task,
    settings: RunSettings,
    console: Console,
) -> list[Groups]:
    """The numbers of every checkpoint, by arm; those of held-out texts under `HELD_OUT`."""
    contract = checkpoints[0].contract
    if task.is_correct is not None:
        return [
            {
                arm.name: recovery_metrics(found[arm.name], examples, task, contract, arm.num_planted)
                if arm.num_planted
                else answer_metrics(found[arm.name], examples, task, contract)
                for arm in plan.arms
            }
            for found in rollouts
        ]
    from launch.evaluation.held_out import held_out_metrics

    groups: list[Groups] = []
    mauve = None
    with progress_bar(console, "measuring", len(targets) * (len(plan.arms) + 1)) as advance:
        if settings.evaluation.mauve is not None:
            mauve = _Mauve.against(examples, task, checkpoints[0], settings)
        for checkpoint, found in zip(checkpoints, rollouts, strict=True):
            numbers: Groups = {}
            for arm in plan.arms:
                numbers[arm.name] = text_metrics(found[arm.name], contract, arm.num_planted)
                if mauve is not None:
                    logs = ActionLogs.from_batch(found[arm.name])
                    texts = final_texts(logs, replay(logs, contract.backspace_id), contract)
                    numbers[arm.name]["mauve"] = mauve.score(texts)
                advance(1)
            model = load_for_evaluation(checkpoint)
            numbers[HELD_OUT] = held_out_metrics(model, examples, contract, checkpoint.max_length)
            advance(1)
            groups.append(numbers)
    return groups


@dataclass(frozen=True)
class _Mauve:
    """MAUVE against the held-out continuations, cut to the length that rollouts may have."""

    settings: MauveSettings
    seed: int
    reference: Features
    features_of: Callable[[Ragged], Features]

    @classmethod
    def against(cls, examples: Dataset, task: Task, checkpoint: Checkpoint, settings: RunSettings) -> _Mauve:
        """checkpoint: whose hidden states are the features, if they are to be a model's."""
        from launch.evaluation.features import encoder_features, model_features

        mauve = settings.evaluation.mauve
        assert mauve is not None
        features_of: Callable[[Ragged], Features]
        if mauve.features == "encoder":

            def features_of(texts: Ragged) -> Features:
                found: Features = encoder_features(task.tokenizer.batch_decode([ids.tolist() for ids in texts.rows()]))
                return found
        else:
            model = load_for_evaluation(checkpoint)

            def features_of(texts: Ragged) -> Features:
                found: Features = model_features(model, texts, task.eos_id)
                return found

        targets = Ragged.from_arrow(
            examples.select_columns(["target_ids"]).with_format("arrow")[:].column("target_ids")
        )
        has_eos = targets.last_values == task.eos_id
        lengths = np.minimum(targets.lengths - has_eos, settings.actors.rollout.max_new_tokens)
        ids = targets.values[index_ranges(targets.offsets[:-1], lengths)]
        return cls(mauve, settings.seed, features_of(Ragged.from_lengths(lengths, ids)), features_of)

    def score(self, texts: Ragged) -> Estimate:
        """MAUVE of generated texts."""
        return mauve_score(self.reference, self.features_of(texts), self.settings.clusters, self.seed)
