"""What a report reads in the log that a run wrote: pushes, throughput of each actor, how it ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.monitoring.run_log import LOG_FILE, RunEvent, RunLog
from launch.report.timeline import MIN_STRETCH_S, read_timeline
from launch.report.wording import pushes
from tests.run_folders import VERSIONS, Clock, write_log


def test_pushes_and_throughput_are_those_that_the_driver_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, tick_s=3.0)
    write_log(tmp_path)
    timeline = read_timeline(tmp_path)
    assert timeline is not None
    assert (timeline.state, timeline.starts_s) == ("finished", [0.0])
    assert [push.version for push in timeline.pushes] == list(range(VERSIONS))
    assert [push.step for push in timeline.pushes] == [0, 10, 20, 30]
    assert [sorted(push.taken_s) for push in timeline.pushes] == [[0, 1], [0], [0, 1], [0]]
    for push in timeline.pushes:
        assert push.published_s is not None
        assert all(taken > push.published_s for taken in push.taken_s.values())
    first, second = timeline.rates
    assert (first.actor, second.actor) == (0, 1)
    sampled = [
        rate * (end - start) for start, end, rate in zip(first.starts_s, first.ends_s, first.actions_per_s, strict=True)
    ]
    assert sum(sampled) == pytest.approx(100 * (VERSIONS - 1))
    # Its counter fell: those are the actions of a new process, and no negative rate.
    assert min(second.actions_per_s) >= 0.0
    assert timeline.warnings[0][1:] == ("learner", "<b>backspaces take over</b>")
    assert "median" in pushes(timeline)


def test_rates_are_not_those_of_how_often_actors_tell_their_counters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch, tick_s=0.25)
    write_log(tmp_path)
    timeline = read_timeline(tmp_path)
    assert timeline is not None
    assert timeline.rates
    for rates in timeline.rates:
        assert all(end - start >= MIN_STRETCH_S for start, end in zip(rates.starts_s, rates.ends_s, strict=True))


@pytest.mark.parametrize(
    ("events", "state"),
    [
        (["run_started"], "open"),
        (["run_started", "run_stopped"], "stopped"),
        (["run_started", "run_stopped", "run_started"], "open"),
        (["run_started", "run_stopped", "run_started", "run_finished"], "finished"),
    ],
)
def test_the_state_is_that_of_the_newest_start(tmp_path: Path, events: list[RunEvent], state: str) -> None:
    with RunLog(tmp_path) as log:
        for event in events:
            log.write("info", "driver", event, "in words")
    timeline = read_timeline(tmp_path)
    assert timeline is not None
    assert timeline.state == state


def test_a_failure_is_quoted_and_a_torn_line_left_out(tmp_path: Path) -> None:
    assert read_timeline(tmp_path) is None
    with pytest.raises(RuntimeError), RunLog(tmp_path) as log:
        raise RuntimeError("no more")
    assert log is not None
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write('{"time": 1.0, "mess')
    timeline = read_timeline(tmp_path)
    assert timeline is not None
    assert (timeline.state, timeline.ended) == ("failed", "RuntimeError: no more")
