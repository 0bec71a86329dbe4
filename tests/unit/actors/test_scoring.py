"""Rewards and features of rollouts: what the scorers say, what is dropped and why, and whose code may run."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from actors.scoring import Answer, RolloutScoring, make_scorer
from actors.settings import FunctionSettings, LengthSettings, PatternSettings, ScoringSettings, WordSettings
from buffer.trajectory.schema import trajectory_schema
from buffer.trajectory.validation import validate
from launch.errors import UserError
from launch.settings.recipe import read_recipe
from launch.settings.run import check_trusted
from tests.training import HandMadeRollouts

ARITHMETIC = Path("launch/recipes/arithmetic_cpu.yaml")
PICKY = FunctionSettings(kind="function", function=f"{__name__}:picky")


def picky(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Fails on a whole batch that holds a 7, has no number for 46, and knows its prompts."""
    assert all(prompt.startswith("In base 10") for prompt in prompts)
    if "7" in answers:
        raise KeyError("seven")
    return [math.nan if answer == "46" else float(len(answer)) for answer in answers]


def short(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """One number for any batch."""
    return [1.0]


def huge(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Beyond float32."""
    return [1e300 for _ in answers]


def broken(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    raise RuntimeError("no connection")


def leaving(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    raise SystemExit("bye")


RELEASED = threading.Event()


def hanging(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Until the test is done."""
    RELEASED.wait()
    return [1.0 for _ in answers]


def score(task, settings, rollouts):
    return RolloutScoring(settings, task.tokenizer, task.contract(), task.example_table()).score(rollouts)


def answers(*texts: str) -> list[Answer]:
    return [Answer("p", text, len(text.split()), "r", True) for text in texts]


@pytest.mark.parametrize(
    ("settings", "texts", "expected"),
    [
        (PatternSettings(kind="pattern", pattern="a+b$"), ["xaab", "aabc", "AB"], [1, 0, 0]),
        (PatternSettings(kind="pattern", pattern="a+b$", ignore_case=True), ["AB"], [1]),
        (WordSettings(kind="word", word="peace"), ["Peace, now", "peaceful", "for peace"], [1, 0, 1]),
        (WordSettings(kind="word", word="c++", ignore_case=False), ["use c++ here", "C++", "c+++"], [1, 0, 1]),
        (LengthSettings(kind="length"), ["", "a b c"], [0, 3]),
        (LengthSettings(kind="length", at_least=2), ["a", "a b", "a b c d"], [0, 1, 1]),
        (LengthSettings(kind="length", at_most=2), ["", "a b", "a b c"], [1, 1, 0]),
    ],
)
def test_scorers_of_texts(settings, texts, expected):
    assert list(make_scorer(settings)(answers(*texts))) == expected


def test_rows_get_reward_and_features_in_the_order_of_the_recipe(task):
    """The text is what is left after all deletions; the length is that of the text, not of the trajectory."""
    settings = ScoringSettings.model_validate(
        {"reward": {"kind": "length"}, "features": {"z": {"kind": "word", "word": "13"}, "a": {"kind": "length"}}}
    )
    scored, dropped = score(task, settings, HandMadeRollouts(task).draw(3))  # 13, 7 and 6, all with <eos>
    assert dropped == {}
    assert scored.schema.equals(trajectory_schema(task.contract()), check_metadata=True)
    assert validate(scored, task.contract()).rejections == ()
    assert scored.column("reward").to_pylist() == [2, 1, 1]
    assert scored.column("features").to_pylist() == [[1, 2], [0, 1], [0, 1]]


def test_an_exact_answer_is_what_evaluation_calls_right(task):
    """By the task's own check; an answer that was cut off is not right."""
    right = [list(row["target_ids"]) for row in task.train.select(range(3))]
    rows = HandMadeRollouts(task).draw(3).to_pylist()
    trajectories = [right[0], right[1][:-1], right[0]]  # right, without <eos>, right for another question
    for row, actions in zip(rows, trajectories, strict=True):
        row |= {"actions": actions, "logprobs": [-1.0] * len(actions), "policy_version": [0] * len(actions)}
    rows[1]["finish_reason"] = "max_length"
    batch = pa.RecordBatch.from_pylist(rows, schema=trajectory_schema(task.contract()))
    scored, _ = score(task, ScoringSettings.model_validate({"reward": {"kind": "exact_answer"}}), batch)
    assert scored.column("reward").to_pylist() == [1, 0, float(task.train[0]["answer"] == task.train[2]["answer"])]


@pytest.mark.parametrize(
    ("function", "kept", "reason"),
    [
        ("picky", ["a/0", "a/2"], f"reward ({__name__}:picky) raised KeyError: 'seven'"),
        ("huge", [], f"reward ({__name__}:huge) is inf"),
        ("broken", [], f"reward ({__name__}:broken) raised RuntimeError: no connection"),
        ("leaving", [], f"reward ({__name__}:leaving) raised SystemExit: bye"),
    ],
)
def test_rollouts_that_have_no_number_are_dropped_with_the_reason(task, function, kept, reason):
    settings = ScoringSettings(reward=FunctionSettings(kind="function", function=f"{__name__}:{function}"))
    scored, dropped = score(task, settings, HandMadeRollouts(task).draw(3))
    assert scored.column("id").to_pylist() == kept
    assert dropped["a/1"] == reason
    assert len(dropped) + len(kept) == 3


def test_a_number_that_is_none_and_a_wrong_count(task):
    rollouts = HandMadeRollouts(task, answers=("46", "1")).draw(2)
    scored, dropped = score(task, ScoringSettings(reward=PICKY), rollouts)
    assert dropped == {"a/0": f"reward ({PICKY.function}) is nan"}
    assert scored.column("reward").to_pylist() == [1]
    counted = FunctionSettings(kind="function", function=f"{__name__}:short")
    settings = ScoringSettings(features={"f": counted})  # right for one answer, so asked one by one it is
    scored, _ = score(task, settings, rollouts)
    assert scored.column("features").to_pylist() == [[1], [1]]


def test_a_scorer_that_does_not_return_is_named_and_not_asked_again(task):
    settings = ScoringSettings(
        features={"f": FunctionSettings(kind="function", function=f"{__name__}:hanging")}, timeout_s=0.1
    )
    try:
        with pytest.raises(TimeoutError, match=r"feature f \(.*:hanging\) did not return within .*=0\.1 for 3"):
            score(task, settings, HandMadeRollouts(task).draw(3))
    finally:
        RELEASED.set()


@pytest.mark.parametrize(
    ("function", "message"),
    [("no_such_module:f", r"cannot be imported .*PYTHONPATH"), ("math:no_such", "module math has no function no_such")],
)
def test_a_function_that_is_not_there(function, message):
    with pytest.raises(ValueError, match=message):
        make_scorer(FunctionSettings(kind="function", function=function))


def test_a_recipe_runs_no_code_that_is_not_trusted_by_name(monkeypatch):
    scoring = ScoringSettings(features={"f": FunctionSettings(kind="function", function="pkg.rewards:score")})
    monkeypatch.setenv("SEQUENCEMATCH_TRUSTED_MODULES", "pkg,other")
    with pytest.raises(UserError, match=r"feature f of the recipe runs code, function pkg\.rewards:score"):
        check_trusted(scoring)
    monkeypatch.setenv("SEQUENCEMATCH_TRUSTED_MODULES", "other, pkg.rewards")
    check_trusted(scoring)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["scoring.features.f={kind: word, wrod: x}"], "scoring.features.f: unknown key 'wrod'; did you mean 'word'?"),
        (["scoring.reward={kind: pattern, pattern: 'a('}"], "'a(' is not a regular expression"),
        (["scoring.reward={kind: length, at_least: 3, at_most: 2}"], "no length is at_least=3 and at_most=2"),
        (["scoring.reward={kind: exact_answer}", "task={name: text}"], "task text has no right answers"),
        (["scoring.timeout_s=5"], "timeout_s has no effect without a reward or features"),
        (
            ["scoring.reward={kind: length}", "stages.sequencematch.objective={name: mle}"],
            "scoring has no effect: no stage makes rollouts",
        ),
    ],
)
def test_scoring_that_is_refused(overrides, message):
    with pytest.raises(UserError) as caught:
        read_recipe(ARITHMETIC, overrides)
    assert message in str(caught.value)
