"""A comparison as a page: what is beyond noise, every number, and curves over the sampling temperature."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from launch.compare.folder import ComparisonFolder
from launch.compare.results import ComparedMetric, Comparison
from launch.report.command import REPORT_FILE
from launch.report.document import render_document
from launch.report.evaluation import GROUPS, METRICS, MetricInfo, change_outcome
from launch.report.plots import COLORS, Plot, Series
from launch.run_folder.folder import shown_path
from launch.settings.evaluation import SAMPLED
from launch.statistics import MIN_SEEDS

_OVER_TEMPERATURE = ("accuracy", "mauve", "diversity")
_TEMPERATURE = "temperature="


def render_page(comparison: Comparison, folder: ComparisonFolder) -> str:
    """The page."""
    metrics = [metric for metric in comparison.metrics() if metric.spreads]
    headlines = [metric for metric in metrics if _info(metric).is_headline and metric.group in GROUPS]
    return render_document(
        "launch.compare",
        "comparison.html.j2",
        comparison=comparison,
        name=folder.path.name,
        folder=shown_path(folder.path),
        reports=[
            (label, seed, report.relative_to(folder.path).as_posix())
            for label, seed in comparison.runs
            if (report := folder.run(label, seed) / REPORT_FILE).is_file()
        ],
        headlines=headlines or metrics[:3],
        groups=[(name, list(each)) for name, each in groupby(metrics, key=lambda metric: metric.group)],
        findings=[(metric, metric.beyond_noise) for metric in headlines if metric.beyond_noise],
        plot=temperature_plot(comparison.objectives, metrics),
        info_of=_info,
        outcome=change_outcome,
        group_titles=GROUPS,
        min_seeds=MIN_SEEDS,
    )


def temperature_plot(objectives: Sequence[str], metrics: Sequence[ComparedMetric]) -> Plot | None:
    """The first of accuracy, MAUVE and diversity that was measured at two temperatures, as curves of the objectives.

    A policy that is merely sharper scores like one that is sampled at a lower temperature.
    """
    for name in _OVER_TEMPERATURE:
        at = {temperature_of(metric.group): metric.spreads for metric in metrics if metric.name == name}
        temperatures = sorted(temperature for temperature in at if temperature is not None)
        if len(temperatures) < 2:
            continue
        series = []
        for index, label in enumerate(objectives):
            if not (x := [temperature for temperature in temperatures if label in at[temperature]]):
                continue
            mean = np.array([100 * at[temperature][label].mean for temperature in x])
            error = np.array([100 * (at[temperature][label].standard_error or 0.0) for temperature in x])
            band = (mean - error).tolist(), (mean + error).tolist()
            series.append(Series(label, x, mean.tolist(), *band, color=index, dash=index // COLORS))
        title = f"{METRICS[name].title} over temperature"
        return Plot(title, "%", "Bands: one standard error.", "temperature", tuple(series))
    return None


def temperature_of(group: str) -> float | None:
    """At which a group of rollouts was sampled; None of greedy and other ones, and of those with the ban changed."""
    if group == SAMPLED:
        return 1.0
    return float(group.removeprefix(_TEMPERATURE)) if group.startswith(_TEMPERATURE) and "," not in group else None


def _info(metric: ComparedMetric) -> MetricInfo:
    return METRICS.get(metric.name, MetricInfo(metric.name.replace("_", " ")))
