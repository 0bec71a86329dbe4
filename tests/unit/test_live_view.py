"""The live display: every number a person asks for is on it, within 80 columns, and in one line for logs."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from actors.status import ActorStatus, MemberStatus, PoolStatus
from launch.live_view import LiveView, RunView, plain_line, render
from launch.recipe import read_recipe
from learner.status import LearnerStatus, StageResult

SETTINGS = read_recipe(Path("launch/recipes/arithmetic_cpu.yaml"))


def view_of_a_running_stage() -> RunView:
    view = RunView("arithmetic-20260101-000000", SETTINGS.stages)
    view.results["trunk"] = StageResult("trunk", 1600, True, "checkpoint", 68.0)
    view.learner = LearnerStatus("sequencematch", 100, 400, 0.1, 11, "training", {"loss": 0.5})
    working = ActorStatus("actor-0", 10, 20_000, 4213.0, 2_000, 5_000, 0, 64, "ahead of the learner")
    view.pool = PoolStatus(
        2, 11, (MemberStatus("actor-0", "running", 0, working), MemberStatus("actor-1", "starting", 0, None))
    )
    return view


def text_of(view: RunView, width: int = 80) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(view, elapsed_s=83.0))
    return console.export_text()


def test_the_display_shows_stage_step_loss_rate_version_backspaces_and_time_left() -> None:
    text = text_of(view_of_a_running_stage())
    for expected in ("100/400", "loss 0.5000", "100 ms/step", "4,213", "v10", "10.0 %", "elapsed 1:23", "✓ trunk"):
        assert expected in text, text
    # 300 steps of this stage and 400 of the control, at 0.1 s each.
    assert "about 1:10 left" in text


def test_nothing_is_cut_off_at_80_columns() -> None:
    lines = text_of(view_of_a_running_stage()).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert not any("…" in line for line in lines)
    assert "ahead of the learner" in "\n".join(lines)


def test_a_log_line_says_the_same() -> None:
    line = plain_line(view_of_a_running_stage(), elapsed_s=83.0)
    assert "\n" not in line
    for expected in ("[1:23]", "sequencematch 100/400 loss 0.5000", "actor-0 v10 4,213 actions/s", "actor-1 starting"):
        assert expected in line, line


def test_a_run_that_has_not_begun_has_no_time_left_to_tell() -> None:
    view = RunView("run", SETTINGS.stages)
    assert view.seconds_left() is None
    assert view.backspace_rate() is None
    assert "left" not in plain_line(view, elapsed_s=0.0)


def test_without_a_terminal_lines_come_at_intervals_not_at_every_refresh(capsys: pytest.CaptureFixture[str]) -> None:
    with LiveView(Console(force_terminal=False), view_of_a_running_stage()) as live:
        for _ in range(50):
            live.refresh()
    assert len(capsys.readouterr().out.splitlines()) == 1
