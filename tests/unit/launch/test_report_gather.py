"""What a report reads of a run folder: metrics, the log, rollouts; and how it draws curves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from buffer.experts.tasks import Task
from buffer.reading.snapshot import read_buffer
from launch.errors import UserError
from launch.monitoring.run_log import LOG_FILE, RunEvent, RunLog
from launch.report.document import MAX_POINTS, thin
from launch.report.gather import MAX_ROLLOUTS, Report, gather, read_metrics, sample_rollouts
from launch.report.page import ANSWERS_WEIGHTS, metric_plots, plans, render, version_plot
from tests.run_folders import (
    VERSIONS,
    Clock,
    new_run,
    write_buffer,
    write_log,
    write_metrics,
)

TABLE = Path(__file__).parents[3] / "docs" / "metrics.md"


def write_lines(run: Path, rows: list[dict[str, object]], rest: str = "") -> None:
    lines = [json.dumps({"time": 1.0 * index} | row) + "\n" for index, row in enumerate(rows)]
    (run / "metrics.jsonl").write_text("".join(lines) + rest)


def gathered(folder: Path) -> Report:
    """A run that has made a step, with the log that is there."""
    write_metrics(folder, {"pretrain": 1})
    return gather(folder)


@pytest.mark.parametrize("count", [2, MAX_POINTS, MAX_POINTS + 1, 100_000])
def test_thinning_keeps_every_spike_and_every_step(count: int) -> None:
    generator = np.random.default_rng(count)
    values = generator.normal(size=count)
    values[count // 2], values[count // 3] = 50.0, np.nan
    x, y, low, high = thin(np.arange(1.0, count + 1), values)
    assert (len(x), x[-1]) == (min(count, MAX_POINTS), count)
    assert np.nanmax(high or y) == 50.0
    assert bool(low) == bool(high) == (count > MAX_POINTS)
    for start, end, mean in zip([0, *map(int, x[:-1])], map(int, x), y, strict=True):
        finite = values[start:end][np.isfinite(values[start:end])]
        assert mean == pytest.approx(finite.mean() if len(finite) else np.nan, nan_ok=True)


def test_the_later_line_of_a_step_counts_and_half_a_line_does_not(tmp_path: Path) -> None:
    rows = [{"stage": "a", "step": step, "loss": float(step)} for step in (1, 2, 3)]
    rows += [{"stage": "a", "step": step, "loss": 10.0 * step, "late": None} for step in (2, 3, 4)]
    write_lines(tmp_path, [*rows, {"stage": "b", "step": 1, "loss": None}], rest='{"time": 9.0, "sta')
    metrics = read_metrics(tmp_path)
    assert list(metrics) == ["a", "b"]
    assert (metrics["a"].steps.tolist(), metrics["a"].times.tolist()) == ([1, 2, 3, 4], [0.0, 3.0, 4.0, 5.0])
    assert metrics["a"].values["loss"].tolist() == [1.0, 20.0, 30.0, 40.0]
    assert "late" not in metrics["a"].values, "a metric without any number has no curve"
    assert metrics["b"].values == {}


def test_no_complete_line_is_no_stage_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == {}
    write_lines(tmp_path, [], rest='{"time": 9.0')
    assert read_metrics(tmp_path) == {}
    write_lines(tmp_path, [{"stage": "a", "step": 1}], rest="no JSON\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read"):
        read_metrics(tmp_path)


def test_plots_name_documented_metrics_once_and_leave_none_out(tmp_path: Path) -> None:
    rows = [line.split("|")[1] for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    planned = [metric for _, legend, _ in plans().values() for metric in legend]
    assert len(planned) == len(set(planned))
    assert set(planned) <= documented
    write_lines(tmp_path, [{"stage": "a", "step": 1, "of_tomorrow": 1.0} | dict.fromkeys(documented, 2.0)])
    plots = metric_plots(read_metrics(tmp_path), ["a"])
    assert sum(len(plot.series) for plot in plots) == len(documented - ANSWERS_WEIGHTS) + 1
    unplanned = {*documented, "of_tomorrow"} - set(planned) - ANSWERS_WEIGHTS
    assert {plot.title for plot in plots} - plans().keys() == unplanned


def test_evaluations_are_drawn_as_lines_at_the_steps_of_their_weights(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"stage": "a", "step": step, "loss": 1.0} for step in range(1, 41)]
    for step, value in ((10, 0.5), (20, 0.4), (40, 0.3)):
        rows[step - 1]["held_out_loss"] = value
    for step, value in ((13, 0.1), (25, 0.2)):
        rows[step - 1] |= {"held_out_accuracy": value, "held_out_answers_step": 10 * (step // 10)}
    write_lines(tmp_path, rows)
    plots = metric_plots(read_metrics(tmp_path), ["a"])
    drawn = {plot.title: plot.series[0] for plot in plots}
    loss, accuracy = drawn["Loss on held-out examples"], drawn["Right answers to held-out questions"]
    assert (list(loss.x), list(loss.y)) == ([10, 20, 40], [0.5, 0.4, 0.3])
    assert (list(accuracy.x), list(accuracy.y)) == ([10, 20], [0.1, 0.2])
    assert len(drawn["Loss"].x) == 40


def test_pushes_are_those_that_the_driver_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, tick_s=3.0)
    write_log(new_run(tmp_path / "run"))
    report = gathered(tmp_path / "run")
    versions = report.versions()
    assert {name: [version for _, version in points] for name, points in versions.items()} == {
        "learner": list(range(VERSIONS)),
        "actor 0": list(range(VERSIONS)),
        "actor 1": list(range(0, VERSIONS, 2)),
    }
    published = {version: at for at, version in versions["learner"]}
    assert all(at > published[version] for name in ("actor 0", "actor 1") for at, version in versions[name])
    plot = version_plot(report)
    assert plot is not None
    assert {series.name: list(series.y) for series in plot.series} == {
        "learner": [1, 2, 3, 3],
        "actor 0": [1, 2, 3, 3],
        "actor 1": [2, 2],
    }, "from the second version to the end of the run"
    assert [line.event for line in report.notable_events] == ["run_started", "learner_warning", "run_finished"]


def test_the_state_is_that_of_the_newest_start(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    steps: list[tuple[RunEvent, str]] = [
        ("run_started", "not finished"),
        ("run_stopped", "stopped"),
        ("run_started", "not finished"),
        ("run_finished", "finished"),
    ]
    for event, state in steps:
        with RunLog(run) as log:
            log.write("info", "driver", event, "in words")
        assert f'<span class="badge {state}">{state}</span>' in render(gathered(run))


def test_a_failure_is_quoted_and_a_torn_line_left_out(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), RunLog(new_run(tmp_path / "run")):
        raise RuntimeError("no more")
    with (tmp_path / "run" / LOG_FILE).open("a") as file:
        file.write('{"time": 1.0, "mess')
    page = render(gathered(tmp_path / "run"))
    assert '<span class="badge failed">failed</span>' in page
    assert "the run ended: RuntimeError: no more" in page


def test_stages_of_the_same_start_are_drawn_together(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    write_metrics(run, {"pretrain": 5})
    page = render(gather(run))
    assert "<summary>pretrain</summary>" in page
    assert "Running, or killed" in page
    write_metrics(run)
    page = render(gather(run))
    assert page.index("<summary>pretrain</summary>") < page.index("<summary>sequencematch, mle_control</summary>")
    assert '<span class="badge finished">finished</span>' in page, "every stage has made all of its steps"


def test_shown_rollouts_are_spread_over_the_run_prefer_deletions_and_have_their_texts(
    tmp_path: Path, task: Task
) -> None:
    write_buffer(tmp_path, task)
    snapshot = read_buffer(tmp_path / "buffer")
    sample = sample_rollouts(snapshot, task.tokenizer)
    assert len(sample) == MAX_ROLLOUTS
    versions = [rollout.actions[0].version for rollout in sample]
    assert versions == sorted(versions)
    assert set(versions) == set(range(VERSIONS))
    assert all("backspace" in [action.kind for action in rollout.actions] for rollout in sample)
    special = {task.backspace_id: ("backspace", ""), task.eos_id: ("end", "")}
    stored = {
        (
            task.tokenizer.decode(row["prompt_ids"]),
            *(special.get(action, ("write", task.tokenizer.decode([action]))) for action in row["actions"]),
        )
        for row in snapshot.trajectories.to_pylist()
    }
    shown = {(each.prompt, *((action.kind, action.text) for action in each.actions)) for each in sample}
    assert len(shown) == len(sample)
    assert shown <= stored
