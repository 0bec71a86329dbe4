"""The live display: every number a person asks for is on it, within 80 columns, and in one line for logs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from actors.pool.controller import MemberStatus, PoolEvent, PoolStatus
from actors.rollout_actor import ActorStatus
from buffer.service.shard import BufferStatus, ShardStatus
from buffer.store.shard import SourceCounters, StoreStatus
from launch.monitoring.live_view import LiveView, RunView, clock, plain_line, render
from launch.settings.recipe import read_recipe
from learner.messages import LearnerStatus, StageResult

SETTINGS = read_recipe(Path("launch/recipes/arithmetic_cpu.yaml"))


def view_of_a_running_stage() -> RunView:
    view = RunView("arithmetic-20260101-000000", SETTINGS.stages)
    view.elapsed_s = 83.0
    view.results["pretrain"] = StageResult("pretrain", 1600, True, "checkpoint", 68.0)
    view.learner = LearnerStatus("sequencematch", 100, 400, 0.1, 11, "training", {"loss": 0.5})
    working = ActorStatus("actor-0", 10, 20_000, 4213.0, 2_000, 5_000, 0, 64, "ahead of the learner")
    view.pool = PoolStatus(
        2, 11, (MemberStatus("actor-0", "running", 0, working), MemberStatus("actor-1", "starting", 0, None))
    )
    return view


def text_of(view: RunView, width: int = 80) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(view))
    return console.export_text()


def test_the_display_shows_stage_step_loss_rate_version_backspaces_and_time_left() -> None:
    text = text_of(view_of_a_running_stage())
    for expected in ("100/400", "loss 0.5000", "100 ms/step", "4,213", "v10", "10.0 %", "elapsed 1:23", "✓ pretrain"):
        assert expected in text, text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    # 300 steps of this stage and 400 of the control, at 0.1 s each.
    assert "about 1:10 left" in text


def test_evaluations_are_shown_with_the_steps_they_belong_to() -> None:
    view = view_of_a_running_stage()
    assert "held-out" not in text_of(view) + plain_line(view)
    found = {"held_out_loss": 0.41, "held_out_loss_step": 100, "held_out_loss_best": 0.4, "held_out_loss_best_step": 50}
    view.learner = replace(view.learner, held_out=found)
    assert "held-out loss 0.4100 at step 100 (best 0.4000 at step 50)" in text_of(view)
    answers = {"held_out_accuracy": 0.625, "held_out_deletions_per_answer": 0.5, "held_out_answers_step": 80}
    view.learner = replace(view.learner, held_out=found | answers)
    assert "answers at step 80: 62.5 % right, 0.50 deletions each" in " ".join(text_of(view).split())
    assert "answers at step 80: 62.5 % right, 0.50 deletions each" in plain_line(view)
    del view.learner.held_out["held_out_accuracy"]  # of a task without right answers
    assert "answers at step 80: 0.50 deletions each" in plain_line(view)


def test_a_stage_that_stopped_early_says_so() -> None:
    view = view_of_a_running_stage()
    assert "stopped early" not in text_of(
        replace(view, results={"pretrain": StageResult("pretrain", 3000, True, "", 9.0)})
    )
    assert "1600/3000 1:08  stopped early" in text_of(view)


def test_an_actor_without_weights_has_none_yet() -> None:
    view = view_of_a_running_stage()
    waiting = ActorStatus("actor-0", -1, 0, 0.0, 0, 0, 0, 0, "waiting for weights")
    view.pool = PoolStatus(1, -1, (MemberStatus("actor-0", "running", 0, waiting),))
    assert "none yet" in text_of(view)
    assert "1 of 1 actors, no weights yet, 0 actions/s" in plain_line(view)
    assert "-1" not in text_of(view) + plain_line(view)


def test_what_keeps_rollouts_from_the_buffer_is_told_without_a_terminal_too() -> None:
    view = view_of_a_running_stage()
    reason = "reward (my_rewards:score) raised RuntimeError: no connection"
    dropping = ActorStatus("actor-0", 3, 900, 80.0, 0, 64, 0, 8, "generating", dropped=1_064, drop_reason=reason)
    events = tuple(
        PoolEvent(number, kind, "actor-1", f"actor-1 {told}")
        for number, (kind, told) in enumerate(
            [("actor_failed", "failed: first"), ("actor_failed", "failed: second"), ("actor_starting", "starting")]
        )
    )
    view.pool = PoolStatus(1, 3, (MemberStatus("actor-0", "running", 0, dropping),), events)
    losses = f"the actors dropped 1,064 rollouts, the last one because {reason}; actor-1 failed: second"
    assert f"1 of 1 actors, v3, 80 actions/s, 0.0 % backspaces, {losses}" in plain_line(view)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599.4, "59:59"), (3599.6, "1:00:00"), (7509.0, "2:05:09")]
)
def test_durations_have_hours_where_there_are_any(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_a_log_line_says_the_same() -> None:
    line = plain_line(view_of_a_running_stage())
    assert "\n" not in line
    for expected in ("[1:23]", "sequencematch 100/400 loss 0.5000", "1 of 2 actors, v10, 4,213 actions/s, 10.0 %"):
        assert expected in line, line


def test_without_a_terminal_lines_come_at_intervals_not_at_every_refresh(capsys: pytest.CaptureFixture[str]) -> None:
    with LiveView(Console(force_terminal=False), view_of_a_running_stage()) as live:
        for _ in range(50):
            live.refresh()
    assert len(capsys.readouterr().out.splitlines()) == 1


def shard_of(live: int, **changes: object) -> ShardStatus:
    sources = {"expert": SourceCounters(0, 0, {}, 0, 0, 0, None)}
    sources["policy"] = SourceCounters(123_456, live, {"stale": 123_456 - live}, 3, 234_567, 0, None)
    store = StoreStatus(sources, 0, 5, 123_456_789, (), **changes)
    return ShardStatus(store, 16_384, True, 0, 1, "host", 3.0, flight="grpc+tcp://127.0.0.1:40123")


def test_shards_are_shown_with_fill_and_state_within_80_columns() -> None:
    view = view_of_a_running_stage()
    view.buffer = BufferStatus((shard_of(12_288), None, shard_of(8_192, maintenance_error="no space left")))
    lines = text_of(view).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert not any("…" in line for line in lines)
    rows = {line.split()[0]: line for line in lines if line[:1].isdigit()}
    assert "ahead of the learner  12,288  75 %   123,456  234,567        0  117.7 MiB" in rows["0"]
    assert "no answer" in rows["1"]
    assert "damaged" in rows["2"]
    assert "50 %" in rows["2"]
    text = " ".join(" ".join(lines).split())
    assert "20,480 policy trajectories live of 246,912" in text
    assert "shard 1: does not answer; shard 2: no space left" in text
    assert "shard 0 over Arrow Flight: grpc+tcp://127.0.0.1:40123" in text
    assert "flight_token of the run folder" in text
