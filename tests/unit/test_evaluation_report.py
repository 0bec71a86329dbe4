"""The evaluation table as a person meets it: in a terminal of 80 columns."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
from rich.console import Console

from launch.evaluation import CheckpointResult, Estimate, Evaluation
from launch.evaluation.report import render_evaluation


@pytest.mark.parametrize("value", [0.05, 0.888, 1.0])
def test_nothing_is_cut_at_80_columns(value: float, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = defaultdict(lambda: defaultdict(lambda: Estimate(value, 0.021, 500)))
    results = tuple(CheckpointResult(label, Path("step"), numbers, ()) for label in ("sequencematch", "mle_control"))
    console = Console(width=80)
    console.print(render_evaluation(Evaluation("arithmetic", True, 500, 0, results)))
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert "actions" in printed.splitlines()[2].split() + printed.splitlines()[1].split()
    assert max(map(len, printed.splitlines())) <= 80
