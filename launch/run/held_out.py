"""Held-out questions during training: an actor answers, the driver counts, the learner logs.

Training does not wait for the answers. The driver asks the pool once the learner has published the weights of an
evaluated step, and polls for the answers. So their metrics are in the line of a later step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from ray.actor import ActorHandle

from actors.engine.interface import Int32
from buffer.experts.tasks import Task
from buffer.processes import NoAnswerError, RemoteCall
from buffer.trajectory.schema import TokenContract
from launch.evaluation.rollout_metrics import ReplayedRollouts, correct_answers
from launch.monitoring.run_log import RunLog
from launch.settings.run import RunSettings
from learner.messages import LearnerStatus
from learner.settings.held_out import HELD_OUT_ACCURACY

if TYPE_CHECKING:
    from datasets import Dataset

ANSWER_TIMEOUT_S = 10.0


def question_examples(settings: RunSettings, task: Task) -> Dataset:
    """The held-out examples whose prompts an actor answers; none without `evaluation.every_steps`."""
    evaluation = settings.evaluation
    return task.held_out_examples(0 if evaluation.every_steps is None else evaluation.questions, settings.seed)


def questions_of(settings: RunSettings, task: Task) -> list[Int32]:
    """Their prompts, token ids [P] of each."""
    return [np.asarray(ids, dtype=np.int32) for ids in question_examples(settings, task)["prompt_ids"]]


class HeldOutQuestions:
    """Asks the pool one evaluation at a time; one that becomes due meanwhile is skipped, which the log says."""

    def __init__(self, settings: RunSettings, task: Task, contract: TokenContract) -> None:
        self._examples = question_examples(settings, task)
        self._task = task
        self._contract = contract
        self._seen = -1
        self._call: RemoteCall[pa.RecordBatch] | None = None

    def follow(self, status: LearnerStatus | None, learner: ActorHandle, pool: ActorHandle, log: RunLog) -> None:
        """Ask the pool when the learner's status requests it; send the metrics of answers to `learner`, rank 0."""
        if self._call is not None and self._call.done():
            try:
                answers = self._call.result(ANSWER_TIMEOUT_S)
            except NoAnswerError as error:
                log.write("warning", "driver", "questions_skipped", str(error))
            else:
                metrics = numbers_of_answers(answers, self._examples, self._task, self._contract)
                version = int(metrics["held_out_answers_version"])
                learner.report_answers.options(concurrency_group="control").remote(version, metrics)
                log.write("info", "driver", "questions_answered", f"answers to held-out questions: {metrics}", metrics)
            self._call = None
        if status is None or status.questions_version <= self._seen:
            return
        self._seen = status.questions_version
        if self._call is None:
            self._call = RemoteCall("the actor pool", pool.answer.remote(self._seen), "answer held-out questions")
        else:
            why = "the previous questions are not answered yet"
            log.write("warning", "driver", "questions_skipped", f"held-out questions, weights v{self._seen}: {why}")


def numbers_of_answers(
    batch: pa.RecordBatch, examples: Dataset, task: Task, contract: TokenContract
) -> dict[str, float]:
    """The metrics of answers to the prompts of `examples`, in their order, all with one version of the weights."""
    rollouts = ReplayedRollouts.of(batch, contract)
    deletions = rollouts.trajectories.actions == contract.backspace_id
    metrics = {
        "held_out_deletions_per_answer": float(deletions.sum() / rollouts.trajectories.num_trajectories),
        "held_out_backspace_rate": float(deletions.mean()),
        "held_out_answers_version": float(batch.column("policy_version")[0][0].as_py()),
    }
    if task.is_correct is not None:
        metrics[HELD_OUT_ACCURACY] = float(correct_answers(rollouts, examples, task).mean())
    return metrics
