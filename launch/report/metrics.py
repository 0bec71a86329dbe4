"""The metrics of every step as plots; `assets/plots.yaml` names those that are drawn together."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import yaml
from pydantic import TypeAdapter

from launch.errors import UserError
from launch.report.plots import MAX_POINTS, Plot, Series, thin
from launch.run_folder.folder import METRICS_FILE

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

OTHERS = "All other metrics"

_KEYS = pa.schema([("time", pa.float64()), ("stage", pa.string()), ("step", pa.int64())])
_Plan = tuple[str, str, dict[str, str], str]


@dataclass(frozen=True)
class StageMetrics:
    """The logged steps of one stage. steps: [n] ascending; times: [n] seconds since 1970. values: [n] by metric, NaN
    where a step has no finite value.
    """

    stage: str
    steps: Int64
    times: Float64
    values: dict[str, Float64]

    @property
    def busy_s(self) -> float:
        """The duration of all steps."""
        return float(np.nansum(self.values["step_s"])) if "step_s" in self.values else 0.0

    @property
    def final_loss(self) -> float | None:
        """Mean over the last tenth of the steps, because a single step is noisy; None without a finite value there."""
        losses = self.values.get("loss", np.empty(0))[-max(1, len(self.steps) // 10) :]
        return float(np.nanmean(losses)) if np.isfinite(losses).any() else None


def read_metrics(run: Path) -> list[StageMetrics]:
    """The stages of `metrics.jsonl` in the order in which they began; none where there is no line yet.

    Of two lines of one stage and step the later one counts (see `learner.metrics.log`). A run that is being written
    may end in a part of a line, which is left out.

    Raises:
        UserError: a complete line is no JSON object. OSError: the file cannot be read.
    """
    path = run / METRICS_FILE
    content = path.read_bytes() if path.is_file() else b""
    content = content[: content.rfind(b"\n") + 1]
    if not content:
        return []
    try:
        table = pa.json.read_json(pa.BufferReader(content), parse_options=pa.json.ParseOptions(explicit_schema=_KEYS))
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return [_stage_metrics(table, stage) for stage in pc.unique(table.column("stage")).to_pylist()]


def metric_plots(
    stages: Sequence[StageMetrics], names: Sequence[str], max_points: int = MAX_POINTS
) -> dict[str, list[Plot]]:
    """The plots with at least one line, by the question that they answer; those that no plan names come last.

    names: of all stages of the run: their order is that of the colors. max_points: of each line.
    """
    others = sorted({metric for stage in stages for metric in stage.values}.difference(planned_metrics()))
    plans = _plans() | {OTHERS: [(name, "", {name: name}, "See docs/metrics.md.") for name in others]}
    groups = {title: [_plot(plan, stages, names, max_points) for plan in group] for title, group in plans.items()}
    return {title: drawn for title, plots in groups.items() if (drawn := [plot for plot in plots if plot.series])}


def planned_metrics() -> Collection[str]:
    """Every metric that a plan names, in order."""
    return [metric for plans in _plans().values() for _, _, metrics, _ in plans for metric in metrics]


@cache
def _plans() -> dict[str, list[_Plan]]:
    text = (resources.files(__package__) / "assets" / "plots.yaml").read_text(encoding="utf-8")
    return TypeAdapter(dict[str, list[_Plan]]).validate_python(yaml.safe_load(text))


def _plot(plan: _Plan, stages: Sequence[StageMetrics], names: Sequence[str], max_points: int) -> Plot:
    title, unit, legend, caption = plan
    drawn = [metric for metric in legend if any(metric in stage.values for stage in stages)]
    series = []
    for stage in stages:
        for dash, metric in enumerate(drawn):
            if metric in stage.values and stage.stage in names:
                x, y, low, high = thin(stage.steps.astype(np.float64), stage.values[metric], max_points)
                color = names.index(stage.stage)
                series.append(Series(legend[metric], x, y, low, high, color, dash, smooth=True, stage=stage.stage))
    return Plot(title, unit, caption, "step", tuple(series))


def _stage_metrics(table: pa.Table, stage: str) -> StageMetrics:
    rows = table.filter(pc.equal(table.column("stage"), stage))
    logged = rows.column("step").to_numpy()
    steps, newest = np.unique(logged[::-1], return_index=True)
    rows = rows.take(len(logged) - 1 - newest)
    values = {
        name: rows.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False)
        for name in rows.column_names
        if name not in _KEYS.names and rows.column(name).null_count < len(rows)
    }
    values = {name: np.where(np.isfinite(column), column, np.nan) for name, column in values.items()}
    return StageMetrics(stage, steps, rows.column("time").to_numpy(), values)
