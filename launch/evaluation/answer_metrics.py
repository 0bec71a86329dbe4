"""What answers are worth, and what editing did for them: numbers from the action logs of an evaluation.

A batch holds one log per example, in the order of the examples. Names of the numbers, each with a standard error:

accuracy            share of answers that are right: ended by `<eos>`, and right by the task's own check.
empty_rate          share of answers whose final text is empty.
truncated_rate      share of logs without `<eos>` (a limit was hit, or the log was aborted).
actions_per_answer  mean length of the logs.
wrong_taken_back    share of wrong tokens that were taken back.
right_taken_back    share of right tokens that were taken back: dithering, and after memorising, damage. Watch it.
recovery            accuracy where the first answer tokens were planted, the first of them wrong: only an answer that
                    takes them back can be right.
planted_taken_back  share of the planted tokens that were taken back.

And those of `launch.evaluation.editing_metrics`.

A token is judged if the text before it, at the moment it is appended, is a prefix of the reference answer. It is right
if it is the reference's next token there, else wrong. What follows a mistake is neither; nor is `<eos>`, which nothing
can take back. A token counts as taken back if it is gone at the end of the log, whichever backspace removed it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from buffer.experts.ragged import Ragged
from buffer.experts.tasks import Task
from buffer.trajectory.replay import ActionLogs, Replay, replay, surviving_events
from buffer.trajectory.schema import TokenContract
from launch.evaluation.editing_metrics import editing_metrics, final_texts, planted_taken_back
from launch.evaluation.planting import first_targets, references
from launch.statistics import Bool, Estimate

if TYPE_CHECKING:
    from datasets import Dataset


def answer_metrics(
    batch: pa.RecordBatch, examples: Dataset, task: Task, contract: TokenContract
) -> dict[str, Estimate]:
    """All numbers of freely generated answers; those that need a right answer only where the task has one.

    Raises:
        ValueError: the logs are not those of the examples, in their order.
    """
    _check_alignment(batch, examples)
    logs = ActionLogs.from_batch(batch)
    played = replay(logs, contract.backspace_id)
    answers = final_texts(logs, played, contract)
    metrics = {
        "empty_rate": Estimate.fraction(answers.lengths == 0),
        "truncated_rate": Estimate.fraction(~_ended(batch)),
        "actions_per_answer": Estimate.mean(logs.lengths),
        **editing_metrics(batch, logs, played, contract),
    }
    if task.is_correct is None:
        return metrics
    judged, right = _judge_tokens(logs, played, references(examples), contract)
    taken_back = ~surviving_events(logs, played, contract.backspace_id)

    def share_taken_back(tokens: Bool) -> Estimate:
        return Estimate.fraction(taken_back[tokens], played.log[tokens], logs.num_logs)

    return {
        "accuracy": Estimate.fraction(_correct(batch, answers, examples, task)),
        **metrics,
        "wrong_taken_back": share_taken_back(judged & ~right),
        "right_taken_back": share_taken_back(judged & right),
    }


def recovery_metrics(
    batch: pa.RecordBatch, examples: Dataset, task: Task, contract: TokenContract, num_planted: int = 1
) -> dict[str, Estimate]:
    """Numbers of answers whose first actions were planted, and wrong (`launch.evaluation.planting`).

    Raises:
        ValueError: the logs are not those of the examples, the task has no right answers, or a log does not begin
            with a wrong token, or is too short to hold those that were planted.
    """
    _check_alignment(batch, examples)
    if task.is_correct is None:
        raise ValueError(f"task {task.name} has no right answers to recover to")
    logs = ActionLogs.from_batch(batch)
    played = replay(logs, contract.backspace_id)
    _, taken_back = planted_taken_back(logs, played, contract, num_planted)
    if (logs.realised[logs.offsets[:-1]] == first_targets(examples)).any():
        raise ValueError("a log begins with the right token: recovery is measured from a wrong one")
    answers = final_texts(logs, played, contract)
    return {
        "recovery": Estimate.fraction(_correct(batch, answers, examples, task)),
        "planted_taken_back": taken_back,
    }


def answer_texts(batch: pa.RecordBatch, task: Task, contract: TokenContract) -> list[str]:
    """The final text of each log, without `<eos>`."""
    logs = ActionLogs.from_batch(batch)
    answers = final_texts(logs, replay(logs, contract.backspace_id), contract)
    return _decode(answers, task)


def _decode(answers: Ragged, task: Task) -> list[str]:
    texts: list[str] = task.tokenizer.batch_decode([ids.tolist() for ids in answers.rows()])
    return texts


def _correct(batch: pa.RecordBatch, answers: Ragged, examples: Dataset, task: Task) -> Bool:
    assert task.is_correct is not None
    rows: list[Mapping[str, object]] = list(examples)
    right = [task.is_correct(text, row) for text, row in zip(_decode(answers, task), rows, strict=True)]
    return np.array(right, dtype=np.bool_) & _ended(batch)


def _ended(batch: pa.RecordBatch) -> Bool:
    ended: Bool = np.array(batch.column("finish_reason").to_pylist()) == "eos"
    return ended


def _judge_tokens(logs: ActionLogs, played: Replay, references: Ragged, contract: TokenContract) -> tuple[Bool, Bool]:
    """(judged [A], right [A]); `right` means something where judged.

    The number of mistakes in the text is a running sum over the log: an appended mistake adds one, taking one back
    subtracts it. A token is judged where that sum was zero before it.
    """
    is_append = logs.realised != contract.backspace_id
    index = played.depth - 1
    in_reference = is_append & (index < references.lengths[played.log])
    right = np.zeros(len(logs.actions), dtype=np.bool_)
    at = references.offsets[:-1][played.log[in_reference]] + index[in_reference]
    right[in_reference] = references.values[at] == logs.realised[in_reference]
    is_mistake = is_append & ~right
    # A backspace takes back the token that made its state.
    change = np.where(is_append, is_mistake.astype(np.int64), -is_mistake[played.state].astype(np.int64))
    before = np.concatenate([[0], np.cumsum(change)])
    mistakes = before[:-1] - before[logs.offsets[:-1]][played.log]
    return in_reference & (mistakes == 0) & ~np.isin(logs.realised, contract.eos_ids), right


def _check_alignment(batch: pa.RecordBatch, examples: Dataset) -> None:
    prompts = examples.select_columns(["prompt_ids"]).with_format("arrow")[:].column("prompt_ids")
    if prompts.to_pylist() != batch.column("prompt_ids").to_pylist():
        raise ValueError(
            f"{batch.num_rows} logs and {len(examples)} examples do not have the same prompts in the same order"
        )
