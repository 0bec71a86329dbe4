"""Metrics of answers: hand-made logs with known numbers, and a token-by-token oracle."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.settings import RolloutSettings
from buffer.experts.noise import NoiseCandidates
from buffer.experts.tasks import load_task
from buffer.settings import ArithmeticTaskSettings
from buffer.trajectory.schema import trajectory_schema
from launch.evaluation.rollout_metrics import ReplayedRollouts, answer_metrics
from launch.evaluation.rollouts import recovery_obstacle, wrong_tokens
from launch.run.held_out import numbers_of_answers
from launch.statistics import Estimate

TASK = load_task(ArithmeticTaskSettings(bases=(2, 10), max_digits=2, train_questions=40, held_out_questions=60))
CONTRACT = TASK.contract()
BACKSPACE = "<"  # in the logs below; "." is <eos>


def ids_of(log: str) -> list[int]:
    special = {BACKSPACE: TASK.backspace_id, ".": TASK.eos_id}
    return [special[c] if c in special else TASK.tokenizer.convert_tokens_to_ids(c) for c in log]


def examples_with(answers: list[str], groups: list[int] | None = None) -> Dataset:
    """Examples with chosen answers; the questions do not matter."""
    return Dataset.from_dict(
        {
            "answer": answers,
            "prompt_ids": [ids_of(f"{index}") for index in range(len(answers))],
            "target_ids": [ids_of(answer + ".") for answer in answers],
            "noise_group": groups or [1] * len(answers),
        }
    )


def trajectories_of(examples: Dataset, logs: list[str]) -> ReplayedRollouts:
    count = len(logs)
    rows = {
        "id": [str(index) for index in range(count)],
        "source": ["policy"] * count,
        "task": ["arithmetic"] * count,
        "prompt_ids": examples["prompt_ids"],
        "actions": [ids_of(log) for log in logs],
        "logprobs": [[0.0] * len(log) for log in logs],
        "policy_version": [[0] * len(log) for log in logs],
        "finish_reason": ["eos" if log.endswith(".") else "max_actions" for log in logs],
        "actor": ["test"] * count,
        "created_at": [datetime.now(UTC)] * count,
    }
    schema = trajectory_schema(CONTRACT)
    absent = {field.name: [None] * count for field in schema if field.name not in rows}
    return ReplayedRollouts.of(pa.RecordBatch.from_pydict({**rows, **absent}, schema=schema), CONTRACT)


def test_the_metrics_of_answers_during_training() -> None:
    """One of three right; three backspaces in three answers of twelve actions."""
    examples = examples_with(["16", "7", "25"])
    answers = trajectories_of(examples, ["17<6.", "8.", "2<3<."]).batch
    assert numbers_of_answers(answers, examples, TASK, CONTRACT) == {
        "held_out_accuracy": pytest.approx(1 / 3),
        "held_out_deletions_per_answer": 1.0,
        "held_out_backspace_rate": pytest.approx(3 / 12),
        "held_out_answers_version": 0.0,
    }
    text = dataclasses.replace(TASK, is_correct=None)
    assert "held_out_accuracy" not in numbers_of_answers(answers, examples, text, CONTRACT)
    with pytest.raises(ValueError, match="do not have the same prompts"):
        numbers_of_answers(answers, examples.select([1, 0, 2]), TASK, CONTRACT)


def values(metrics: dict[str, Estimate]) -> dict[str, float | None]:
    return {name: estimate.value for name, estimate in metrics.items()}


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        # (accuracy, empty, truncated, backspaces/actions, wrong taken back, right taken back), answer 16
        ("16.", (1, 0, 0, 0, None, 0)),
        ("17<6.", (1, 0, 0, 1 / 5, 1, 0)),
        ("17.", (0, 0, 0, 0, 0, 0)),
        ("1<16.", (1, 0, 0, 1 / 5, None, 1 / 3)),  # the first 1 was right and taken back
        ("79<<16.", (1, 0, 0, 2 / 7, 1, 0)),  # 9 follows a mistake: not judged, though taken back
        ("71<6.", (0, 0, 0, 1 / 5, 0, None)),  # nothing after the 7 is judged
        ("166<.", (1, 0, 0, 1 / 5, 1, 0)),  # one digit too many
        (".", (0, 1, 0, 0, None, None)),  # ending early is no token that could be taken back
        ("1.", (0, 0, 0, 0, None, 0)),
        ("16", (0, 0, 1, 0, None, 0)),  # right so far, but never ended
        ("7<", (0, 1, 1, 1 / 2, 1, None)),
        ("17<7<7<6.", (1, 0, 0, 3 / 9, 1, 0)),
    ],
)
def test_numbers_of_one_log(log: str, expected: tuple[float | None, ...]) -> None:
    examples = examples_with(["16"])
    metrics = values(answer_metrics(trajectories_of(examples, [log]), examples, TASK))
    names = [
        "accuracy",
        "empty_rate",
        "truncated_rate",
        "backspace_rate",
        "wrong_tokens_deleted",
        "correct_tokens_deleted",
    ]
    assert [metrics.pop(name) for name in names] == [None if x is None else pytest.approx(x) for x in expected]
    assert metrics["actions_per_answer"] == len(log)


def oracle(answer: str, log: str) -> tuple[list[bool], list[bool]]:
    """(taken back of each wrong token, of each right token) with strings and stacks."""
    reference = answer + "."
    text: list[tuple[str, int]] = []
    verdicts: dict[int, bool] = {}
    back: dict[int, bool] = {}
    for time, token in enumerate(log):
        if token == BACKSPACE:
            back[text.pop()[1]] = True
            continue
        so_far = "".join(t for t, _ in text)
        if token != "." and reference.startswith(so_far):
            verdicts[time] = reference.startswith(so_far + token)
        text.append((token, time))
    wrong = [back.get(time, False) for time, right in verdicts.items() if not right]
    right = [back.get(time, False) for time, right in verdicts.items() if right]
    return wrong, right


@st.composite
def log_and_answer(draw: st.SampleFn) -> tuple[str, str]:
    answer = draw(st.text("12-", min_size=1, max_size=3))
    depth, log = 0, ""
    for token in draw(st.lists(st.sampled_from("12-<<"), max_size=12)):
        if token == BACKSPACE and depth == 0:
            continue
        depth += -1 if token == BACKSPACE else 1
        log += token
    return answer, log + draw(st.sampled_from(["", "."]))


@given(st.lists(log_and_answer().filter(lambda pair: pair[1]), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_judged_tokens_equal_the_oracle(pairs: list[tuple[str, str]]) -> None:
    examples = examples_with([answer for answer, _ in pairs])
    batch = trajectories_of(examples, [log for _, log in pairs])
    metrics = answer_metrics(batch, examples, TASK)
    verdicts = [oracle(answer, log) for answer, log in pairs]
    wrong = [taken_back for verdict in verdicts for taken_back in verdict[0]]
    assert metrics["wrong_tokens_deleted"] == Estimate.fraction(np.array(wrong, dtype=bool))
    right = [taken_back for verdict in verdicts for taken_back in verdict[1]]
    assert metrics["correct_tokens_deleted"] == Estimate.fraction(np.array(right, dtype=bool))


def test_standard_errors() -> None:
    assert Estimate.fraction(np.array([True, False, False, False])) == Estimate(
        0.25, pytest.approx(0.2165, abs=1e-4), 4
    )
    assert Estimate.mean(np.array([2, 4])) == Estimate(3.0, pytest.approx(1.0), 2)
    assert Estimate.mean(np.array([7])) == Estimate(7.0, None, 1)
    assert Estimate.fraction(np.array([], dtype=bool)) == Estimate(None, None, 0)
    assert Estimate.mean(np.array([], dtype=np.int64)) == Estimate(None, None, 0)


def test_rollouts_of_other_prompts_are_refused() -> None:
    examples = examples_with(["16", "17"])
    batch = trajectories_of(examples, ["16.", "17."])
    with pytest.raises(ValueError, match="do not have the same prompts in the same order"):
        answer_metrics(batch, examples.select([1, 0]), TASK)
    with pytest.raises(ValueError, match="2 rollouts and 1 examples"):
        answer_metrics(batch, examples.select([0]), TASK, 1)


def test_recovery() -> None:
    examples = examples_with(["16", "16", "16", "16"])
    metrics = answer_metrics(trajectories_of(examples, ["7<16.", "71<<17.", "716.", "7<16"]), examples, TASK, 1)
    assert metrics["recovery"] == Estimate.fraction(np.array([True, False, False, False]))
    assert metrics["forced_tokens_deleted"] == Estimate.fraction(np.array([True, True, False, True]))
    several = answer_metrics(trajectories_of(examples, ["72<<16.", "71<6.", "71.", "77."]), examples, TASK, 2)
    assert several["recovery"] == metrics["recovery"]
    assert (several["forced_tokens_deleted"].value, several["forced_tokens_deleted"].count) == (3 / 8, 8)
    for logs, num_forced, message in (
        (["7<16.", "16.", "7.", "7."], 1, "begins with the right token"),
        (["72<<16.", "71<6.", "71.", "7"], 2, "a rollout is shorter than the 2 tokens that were forced"),
    ):
        with pytest.raises(ValueError, match=message):
            answer_metrics(trajectories_of(examples, logs), examples, TASK, num_forced)


@pytest.mark.parametrize("count", [1, 3])
def test_forced_tokens_are_digits_of_the_base_and_the_first_is_wrong(count: int) -> None:
    forced, again = (
        wrong_tokens(TASK.held_out, TASK.task_noise, CONTRACT, count, np.random.default_rng(0)) for _ in range(2)
    )
    assert forced.shape == (len(TASK.held_out), count)
    assert forced.tolist() == again.tolist()
    for tokens, example in zip(forced.tolist(), TASK.held_out, strict=True):
        base = 2 if "In base 2," in example["question"] else 10
        digits = [TASK.tokenizer.decode([token]) for token in tokens]
        assert set(digits) <= set("0123456789"[:base])
        assert not example["answer"].startswith(digits[0])
    assert all(len(set(column)) > 5 for column in forced.T.tolist())


def test_examples_without_a_wrong_token_are_counted_by_their_group() -> None:
    examples = examples_with(["16", "26", "16", "36"], groups=[0, 0, 1, 1])
    one, two = ids_of("12")
    candidates = NoiseCandidates.uniform([np.array([one], dtype=np.int32), np.array([one, two], dtype=np.int32)])
    task = dataclasses.replace(TASK, task_noise=candidates)
    found = recovery_obstacle(task, CONTRACT, examples, RolloutSettings())
    assert found == "1 of 4 examples have no plausible wrong token to begin with"
    with pytest.raises(ValueError, match="example 0 has no candidate"):
        wrong_tokens(examples, candidates, CONTRACT, 1, np.random.default_rng(0))
