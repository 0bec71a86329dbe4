"""The evaluation's tables as a person meets them, in a terminal of 80 columns, and its numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from launch.evaluation.report import render_evaluation
from launch.evaluation.results import HELD_OUT, CheckpointResult, Evaluation
from launch.statistics import Estimate

LABELS = ("mle_control", "behavior_cloning")


def printed(evaluation: Evaluation, capsys: pytest.CaptureFixture[str]) -> list[str]:
    Console(width=80).print(render_evaluation(evaluation))
    lines = capsys.readouterr().out.splitlines()
    assert not any("…" in line for line in lines)
    assert max(map(len, lines)) <= 80
    return lines


ANSWER_METRICS = (
    "accuracy",
    "recovery",
    "backspace_rate",
    "wrong_tokens_deleted",
    "correct_tokens_deleted",
    "actions_per_answer",
)


def answers_of(labels: Sequence[str], value: float) -> Evaluation:
    """Of so many checkpoints, all of whose numbers are the same."""
    numbers = {
        group: dict.fromkeys(ANSWER_METRICS, Estimate(value, 0.021, 500)) for group in ("sampled", "greedy", "recovery")
    }
    results = tuple(CheckpointResult(label, Path("step"), numbers) for label in labels)
    return Evaluation.of("arithmetic", 500, 0, results, {}, {})


@pytest.mark.parametrize("value", [0.05, 0.888, 1.0])
@pytest.mark.parametrize("label", ["{}", "/home/somebody/experiments/runs/a-run-of-{}/checkpoints/x/step-000400"])
def test_nothing_is_cut_at_80_columns(value: float, label: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(answers_of([label.format(name) for name in ("sequencematch", "mle_control")], value), capsys)
    assert "actions" in " ".join(lines[:4])
    assert sum(line.count(f"{100 * value:.1f} ±2.1") for line in lines) == 6


def numbers_of(shift: float, groups: tuple[str, ...], names: tuple[str, ...]) -> dict[str, dict[str, Estimate]]:
    rng = np.random.default_rng(0)
    shared = rng.random(200)
    return {
        group: {name: Estimate.mean(0.5 * shared + shift * (name != "accuracy")) for name in names} for group in groups
    }


def text_evaluation() -> Evaluation:
    names = (
        "mauve", "diversity", "self_bleu", "entropy_2gram_bits", "tokens_per_text", "truncated_rate",
        "backspace_rate", "actions_per_final_token", "rewritten_rate", "longest_rewrite_run", "max_actions_rate",
    )  # fmt: skip
    groups = ("sampled", "greedy", "top_p=0.95", "temperature=0.7", "temperature=0.7, banned")
    held_out = ("perplexity", "perplexity_without_backspace", "backspace_prob")
    recovered = (*names, "recovery")
    results = tuple(
        CheckpointResult(
            label,
            Path("step"),
            numbers_of(shift, groups, names)
            | numbers_of(shift, ("recovery",), recovered)
            | numbers_of(20 + shift, (HELD_OUT,), held_out),
            (),
        )
        for label, shift in zip(LABELS, (0.0, 0.3), strict=True)
    )
    return Evaluation.of("text", 200, 7, results, {"max_actions": 9}, {"accuracy": "task text has no answers"})


def test_texts_by_decoding(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(text_evaluation(), capsys)
    assert sum(line.startswith("  temperature=0.7, banned ") for line in lines) == 4  # two tables, two checkpoints
    assert sum(line.startswith("  recovery ") for line in lines) == 4
    assert sum(line.startswith("behavior_cloning") for line in lines) == 4
    (change,) = (line for line in lines if line.startswith("behavior_cloning") and "+30.0" in line)
    assert "~" not in change
    assert any("left out: accuracy (task text has no answers)" in line for line in lines)


def test_further_decodings_of_answers(capsys: pytest.CaptureFixture[str]) -> None:
    groups = ("sampled", "greedy", "recovery", "temperature=0.7", "recovery, allowed")
    results = tuple(CheckpointResult(label, Path("step"), numbers_of(0.1, groups, ANSWER_METRICS)) for label in LABELS)
    lines = printed(Evaluation.of("arithmetic", 200, 0, results, {}, {}), capsys)
    assert sum(line.startswith("  recovery, allowed") for line in lines) == 2
    assert any(line.startswith("behavior_cloning") and line.count("~") == 3 for line in lines)  # the same numbers


def test_json_has_every_number_with_its_error_and_paired_differences() -> None:
    written = json.loads(json.dumps(text_evaluation().to_json()))
    assert (written["seed"], written["baseline"], written["conditions"]) == (7, "mle_control", {"max_actions": 9})
    first, second = written["checkpoints"]
    assert second["metrics"]["sampled"]["diversity"].keys() == {"value", "standard_error", "n"}
    assert first["differences"] == {}
    change = second["differences"]["sampled"]["diversity"]
    assert change["value"] == pytest.approx(0.3)
    assert change["standard_error"] == pytest.approx(0.0, abs=1e-9)  # what the examples share cancels
    assert change["within_noise"] is False
