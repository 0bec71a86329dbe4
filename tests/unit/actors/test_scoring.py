"""Rewards and features of rollouts: what the scorers say, what is dropped and why, and whose code may run."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from actors.scoring import Answer, RolloutScoring, make_scorer
from actors.settings import LengthSettings, PatternSettings, ScoringSettings, WordSettings
from buffer.settings import CustomSettings
from buffer.trajectory.schema import trajectory_schema
from buffer.trajectory.validation import validate
from launch.errors import UserError
from launch.settings.recipe import read_recipe
from tests.training import HandMadeRollouts

ARITHMETIC = Path("launch/recipes/arithmetic_cpu.yaml")


def custom(name: str) -> CustomSettings:
    """A scorer of this module."""
    return CustomSettings(name="custom", path=f"{__name__}:{name}")


class Picky:
    """Fails on a whole batch that holds a 7, has no number for 46, and knows its prompts."""

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        assert all(answer.prompt.startswith("In base 10") for answer in answers)
        if "7" in [answer.text for answer in answers]:
            raise KeyError("seven")
        return [math.nan if answer.text == "46" else float(len(answer.text)) for answer in answers]


class Short:
    """One number for any batch."""

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        return [1.0]


class Huge:
    """Beyond float32."""

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        return [1e300 for _ in answers]


class Broken:
    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        raise RuntimeError("no connection")


class Leaving:
    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        raise SystemExit("bye")


RELEASED = threading.Event()


class Hanging:
    """Until the test is done."""

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        RELEASED.wait()
        return [1.0 for _ in answers]


def score(task, settings, rollouts):
    return RolloutScoring(settings, task.tokenizer, task.contract(), task.example_table()).score(rollouts)


def answers(*texts: str) -> list[Answer]:
    return [Answer("p", text, len(text.split()), "r", True) for text in texts]


@pytest.mark.parametrize(
    ("settings", "texts", "expected"),
    [
        (PatternSettings(name="pattern", pattern="a+b$"), ["xaab", "aabc", "AB"], [1, 0, 0]),
        (PatternSettings(name="pattern", pattern="a+b$", ignore_case=True), ["AB"], [1]),
        (WordSettings(name="word", word="peace"), ["Peace, now", "peaceful", "for peace"], [1, 0, 1]),
        (WordSettings(name="word", word="c++", ignore_case=False), ["use c++ here", "C++", "c+++"], [1, 0, 1]),
        (LengthSettings(name="length"), ["", "a b c"], [0, 3]),
        (LengthSettings(name="length", at_least=2), ["a", "a b", "a b c d"], [0, 1, 1]),
        (LengthSettings(name="length", at_most=2), ["", "a b", "a b c"], [1, 1, 0]),
    ],
)
def test_scorers_of_texts(settings, texts, expected):
    assert list(make_scorer(settings)(answers(*texts))) == expected


def test_rows_get_reward_and_features_in_the_order_of_the_recipe(task):
    """The text is what is left after all deletions; the length is that of the text, not of the trajectory."""
    settings = ScoringSettings.model_validate(
        {"reward": {"name": "length"}, "features": {"z": {"name": "word", "word": "13"}, "a": {"name": "length"}}}
    )
    scored, dropped = score(task, settings, HandMadeRollouts(task).sample(3))  # 13, 7 and 6, all with <eos>
    assert dropped == {}
    assert scored.schema.equals(trajectory_schema(task.contract()), check_metadata=True)
    assert validate(scored, task.contract()).rejections == ()
    assert scored.column("reward").to_pylist() == [2, 1, 1]
    assert scored.column("features").to_pylist() == [[1, 2], [0, 1], [0, 1]]


def test_an_exact_answer_is_what_evaluation_calls_right(task):
    """By the task's own check; an answer that was cut off is not right."""
    right = [list(row["target_ids"]) for row in task.train.select(range(3))]
    rows = HandMadeRollouts(task).sample(3).to_pylist()
    trajectories = [right[0], right[1][:-1], right[0]]  # right, without <eos>, right for another question
    for row, actions in zip(rows, trajectories, strict=True):
        row |= {"actions": actions, "logprobs": [-1.0] * len(actions), "policy_version": [0] * len(actions)}
    rows[1]["finish_reason"] = "max_length"
    batch = pa.RecordBatch.from_pylist(rows, schema=trajectory_schema(task.contract()))
    scored, _ = score(task, ScoringSettings.model_validate({"reward": {"name": "exact_answer"}}), batch)
    assert scored.column("reward").to_pylist() == [1, 0, float(task.train[0]["answer"] == task.train[2]["answer"])]


@pytest.mark.parametrize(
    ("name", "kept", "reason"),
    [
        ("Picky", ["a/0", "a/2"], f"reward ({__name__}:Picky) raised KeyError: 'seven'"),
        ("Huge", [], f"reward ({__name__}:Huge) is inf"),
        ("Broken", [], f"reward ({__name__}:Broken) raised RuntimeError: no connection"),
        ("Leaving", [], f"reward ({__name__}:Leaving) raised SystemExit: bye"),
    ],
)
def test_rollouts_that_have_no_number_are_dropped_with_the_reason(task, name, kept, reason):
    settings = ScoringSettings(reward=custom(name))
    scored, dropped = score(task, settings, HandMadeRollouts(task).sample(3))
    assert scored.column("id").to_pylist() == kept
    assert dropped["a/1"] == reason
    assert len(dropped) + len(kept) == 3


def test_a_number_that_is_none_and_a_wrong_count(task):
    rollouts = HandMadeRollouts(task, answers=("46", "1")).sample(2)
    scored, dropped = score(task, ScoringSettings(reward=custom("Picky")), rollouts)
    assert dropped == {"a/0": f"reward ({__name__}:Picky) is nan"}
    assert scored.column("reward").to_pylist() == [1]
    settings = ScoringSettings(features={"f": custom("Short")})  # right for one answer, so asked one by one it is
    scored, _ = score(task, settings, rollouts)
    assert scored.column("features").to_pylist() == [[1], [1]]


def test_a_scorer_that_does_not_return_is_named_and_not_asked_again(task):
    settings = ScoringSettings(features={"f": custom("Hanging")}, timeout_s=0.1)
    try:
        with pytest.raises(TimeoutError, match=r"feature f \(.*:Hanging\) did not return within .*=0\.1 for 3"):
            score(task, settings, HandMadeRollouts(task).sample(3))
    finally:
        RELEASED.set()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["scoring.features.f={name: word, wrod: x}"], "scoring.features.f: unknown key 'wrod'; did you mean 'word'?"),
        (["scoring.reward={name: pattern, pattern: 'a('}"], "'a(' is not a regular expression"),
        (["scoring.reward={name: length, at_least: 3, at_most: 2}"], "no length is at_least=3 and at_most=2"),
        (["scoring.reward={name: exact_answer}", "task={name: text}"], "task text has no right answers"),
        (["scoring.timeout_s=5"], "timeout_s has no effect without a reward or features"),
        (
            ["scoring.reward={name: length}", "stages.sequencematch.objective={name: mle}"],
            "scoring has no effect: no stage makes rollouts",
        ),
    ],
)
def test_scoring_that_is_refused(overrides, message):
    with pytest.raises(UserError) as caught:
        read_recipe(ARITHMETIC, overrides)
    assert message in str(caught.value)
