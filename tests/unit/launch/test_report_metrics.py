"""Metrics of a report: no spike is lost, the later of two lines counts, a live file may end in the middle of one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from launch.errors import UserError
from launch.report.metrics import OTHERS, metric_plots, planned_metrics, read_metrics
from launch.report.plots import MAX_POINTS, thin

TABLE = Path(__file__).parents[3] / "docs" / "metrics.md"


def write_lines(run: Path, rows: list[dict[str, object]], rest: str = "") -> None:
    lines = [json.dumps({"time": 1.0 * index} | row) + "\n" for index, row in enumerate(rows)]
    (run / "metrics.jsonl").write_text("".join(lines) + rest)


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
    first, second = read_metrics(tmp_path)
    assert (first.stage, first.steps.tolist(), first.times.tolist()) == ("a", [1, 2, 3, 4], [0.0, 3.0, 4.0, 5.0])
    assert first.values["loss"].tolist() == [1.0, 20.0, 30.0, 40.0]
    assert first.final_loss == 40.0
    assert (second.stage, second.values, second.final_loss) == ("b", {}, None)
    assert "late" not in first.values, "a metric without any number has no curve"


def test_no_complete_line_is_no_stage_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    write_lines(tmp_path, [], rest='{"time": 9.0')
    assert read_metrics(tmp_path) == []
    write_lines(tmp_path, [{"stage": "a", "step": 1}], rest="no JSON\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read"):
        read_metrics(tmp_path)


def test_charts_name_documented_metrics_once_and_leave_none_out(tmp_path: Path) -> None:
    rows = [line.split("|")[1] for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    planned = planned_metrics()
    assert len(planned) == len(set(planned))
    assert set(planned) <= documented
    write_lines(tmp_path, [{"stage": "a", "step": 1, "of_tomorrow": 1.0} | dict.fromkeys(documented, 2.0)])
    groups = metric_plots(read_metrics(tmp_path), ["a"])
    assert sum(len(plot.series) for plots in groups.values() for plot in plots) == len(documented) + 1
    assert list(groups)[-1] == OTHERS
    assert {plot.title for plot in groups[OTHERS]} == {*documented, "of_tomorrow"} - set(planned)


@pytest.mark.parametrize(("values", "logarithmic"), [([0.01, 5.0], True), ([1.0, 5.0], False), ([0.0, 500.0], False)])
def test_the_axis_is_logarithmic_where_a_linear_one_would_hide_most(
    tmp_path: Path, values: list[float], logarithmic: bool
) -> None:
    write_lines(tmp_path, [{"stage": "a", "step": step, "loss": value} for step, value in enumerate(values)])
    (loss,) = metric_plots(read_metrics(tmp_path), ["a"])["Is it learning?"]
    assert loss.logarithmic == logarithmic
