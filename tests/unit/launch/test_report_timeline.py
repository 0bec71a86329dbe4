"""What a report reads in the log that a run wrote: pushes, throughput of each actor, how it ended."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from launch.monitoring.run_log import LOG_FILE, RunEvent, RunLog
from launch.report.timeline import MAX_ACTORS, MIN_STRETCH_S, Progress, read_timeline, timeline_plots
from tests.run_folders import VERSIONS, Clock, write_log


def test_pushes_and_throughput_are_those_that_the_driver_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, tick_s=3.0)
    write_log(tmp_path)
    timeline = read_timeline(tmp_path)
    assert timeline is not None
    assert timeline.state == "finished"
    assert [push.version for push in timeline.pushes] == list(range(VERSIONS))
    assert [push.step for push in timeline.pushes] == [0, 10, 20, 30]
    assert [sorted(push.loaded_s) for push in timeline.pushes] == [[0, 1], [0], [0, 1], [0]]
    for push in timeline.pushes:
        assert push.published_s is not None
        assert all(loaded > push.published_s for loaded in push.loaded_s.values())
    assert timeline.progress[0].actions[-1] == 100 * (VERSIONS - 1)
    # The counter of actor 1 fell: those are the actions of a new process, and no negative rate.
    versions, rates = timeline_plots(timeline)
    assert [series.name for series in rates.series] == ["actor 0", "actor 1"]
    assert min(rates.series[1].y) >= 0.0
    assert timeline.warnings[0][1:] == ("learner", "<b>backspaces take over</b>")
    assert "(median)" in versions.caption


def test_rates_are_not_those_of_how_often_actors_tell_their_counters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch, tick_s=0.25)
    write_log(tmp_path)
    timeline = read_timeline(tmp_path)
    assert timeline is not None
    assert timeline.progress
    for progress in timeline.progress.values():
        assert all(later - earlier >= MIN_STRETCH_S for earlier, later in pairwise(progress.times_s))


def test_plots_say_whom_they_leave_out(tmp_path: Path) -> None:
    write_log(tmp_path)
    timeline = read_timeline(tmp_path)
    assert timeline is not None
    assert not any("Drawn are the first" in plot.caption for plot in timeline_plots(timeline))
    many = replace(timeline, progress={actor: Progress([0.0, 5.0], [0, 10]) for actor in range(1024)})
    rates = timeline_plots(many)[-1]
    assert len(rates.series) == MAX_ACTORS
    assert f"Drawn are the first {MAX_ACTORS} of 1,024 actors." in rates.caption


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
    assert (timeline.state, timeline.cause) == ("failed", "RuntimeError: no more")
