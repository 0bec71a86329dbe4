"""What the page's script draws: charts and the rollouts to step through, as plain JSON values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np

from launch.report.charts import Chart
from launch.report.curves import BUCKETS
from launch.report.draws import Histogram
from launch.report.gather import Report, StageSummary
from launch.report.rollouts import Rollout
from launch.report.timeline import Push, Rates, Timeline

Json: TypeAlias = str | int | float | bool | Sequence["Json"] | dict[str, "Json"] | None

MAX_ACTORS = 12
"""Actors that are drawn; more lines cannot be told apart."""


def page_data(report: Report) -> dict[str, Json]:
    """stages, charts by their id, rollouts."""
    stages = [stage.name for stage in report.stages]
    charts: dict[str, Json] = {}
    for group_index, group in enumerate(report.charts):
        for chart_index, chart in enumerate(group.charts):
            charts[chart_id(group_index, chart_index)] = _curves(chart, stages)
    if report.timeline is not None:
        if report.timeline.pushes:
            charts["pushes"] = _staircases(report.timeline)
        if report.timeline.rates:
            charts["rates"] = _rates(report.timeline.rates)
    for index, histogram in enumerate(report.draws.histograms if report.draws else ()):
        charts[f"draws-{index}"] = _bars(histogram)
    rollouts = report.rollouts.rollouts if report.rollouts else ()
    return {
        "stages": [{"name": stage.name, "shown": stage.name in shown_stages(report.stages)} for stage in report.stages],
        "charts": charts,
        "rollouts": [_rollout(rollout) for rollout in rollouts],
    }


def chart_id(group: int, chart: int) -> str:
    """Of a metric chart."""
    return f"metrics-{group}-{chart}"


def shown_stages(stages: Sequence[StageSummary]) -> set[str]:
    """Stages that are drawn at first: not those that others start from, which are often many times as long."""
    begun = [stage for stage in stages if stage.num_steps > 0]
    trunks = {stage.start_from for stage in begun}
    return {stage.name for stage in begun if stage.name not in trunks}


def actor_indices(timeline: Timeline) -> list[int]:
    """Every actor that took weights or counted actions, by its index."""
    taking = {actor for push in timeline.pushes for actor in push.taken_s}
    return sorted(taking | {rates.actor for rates in timeline.rates})


def thinned(pushes: Sequence[Push], count: int) -> list[Push]:
    """At most `count` of them, evenly, the first and the last one included."""
    if len(pushes) <= count:
        return list(pushes)
    return [pushes[index] for index in np.linspace(0, len(pushes) - 1, count).round().astype(int).tolist()]


def _curves(chart: Chart, stages: Sequence[str]) -> dict[str, Json]:
    metrics = [metric for metric in chart.plan.metrics if any(curve.metric == metric for curve in chart.curves)]
    series: list[Json] = [
        {
            "name": chart.plan.metrics[curve.metric],
            "stage": stages.index(curve.stage),
            "dash": metrics.index(curve.metric),
            "x": curve.steps,
            "y": curve.mean,
            "low": curve.low,
            "high": curve.high,
        }
        for curve in chart.curves
        if curve.stage in stages
    ]
    return {
        "kind": "lines",
        "x_name": "step",
        "unit": chart.plan.unit,
        "log": chart.logarithmic,
        "zero": False,
        "series": series,
        "legend": [chart.plan.metrics[metric] for metric in metrics],
    }


def _staircases(timeline: Timeline) -> dict[str, Json]:
    """The newest version of the learner and of each actor over time. Stages without rollouts may come before the
    second version, for as long as they like.
    """
    pushes = timeline.pushes[1:] or timeline.pushes
    lines = [("learner", [(push.published_s, push.version) for push in pushes if push.published_s is not None])]
    for actor in actor_indices(timeline)[:MAX_ACTORS]:
        taken = [(push.taken_s[actor], push.version) for push in pushes if actor in push.taken_s]
        lines.append((f"actor {actor}", taken))
    series: list[Json] = []
    for color, (name, points) in enumerate(lines):
        if not points:  # an actor that took the first version only, in a run of seconds
            continue
        kept = [points[index] for index in _spread(len(points))]
        ends = [*[at for at, _ in kept[1:]], timeline.last_s]
        series.append(
            {
                "name": name,
                "color": color,
                "dash": 0,
                "x": _rounded(second for (at, _), end in zip(kept, ends, strict=True) for second in (at, end)),
                "y": [version for _, version in kept for _ in (0, 1)],
            }
        )
    return _time_chart("version", series) | {"whole": True}


def _rates(rates: Sequence[Rates]) -> dict[str, Json]:
    series: list[Json] = []
    for each in rates[:MAX_ACTORS]:
        starts, ends, values = _merged(each)
        series.append(
            {
                "name": f"actor {each.actor}",
                "color": each.actor + 1,
                "dash": 0,
                "x": _rounded(second for pair in zip(starts, ends, strict=True) for second in pair),
                "y": _rounded(value for value in values for _ in (0, 1)),
            }
        )
    return _time_chart("actions/s", series) | {"zero": True}


def _merged(rates: Rates) -> tuple[list[float], list[float], list[float]]:
    """Starts, ends and rates of neighbouring stretches put together, so that there are at most `BUCKETS`."""
    bounds = _spread(len(rates.starts_s))
    starts, ends = np.array(rates.starts_s), np.array(rates.ends_s)
    seconds = ends - starts
    actions = np.add.reduceat(np.array(rates.actions_per_s) * seconds, bounds)
    merged = np.divide(actions, np.add.reduceat(seconds, bounds))
    last = np.append(np.array(bounds[1:], dtype=np.int64), len(starts)) - 1
    return starts[bounds].tolist(), ends[last].tolist(), merged.tolist()


def _time_chart(unit: str, series: list[Json]) -> dict[str, Json]:
    return {"kind": "lines", "x_name": "s", "unit": unit, "log": False, "zero": False, "series": series, "legend": []}


def _bars(histogram: Histogram) -> dict[str, Json]:
    return {
        "kind": "bars",
        "x_name": histogram.unit,
        "unit": "rollouts" if histogram.unit == "draws" else "draws",
        "edges": histogram.edges,
        "counts": histogram.counts,
        "mean": histogram.mean,
        "p95": histogram.p95,
    }


def _rollout(rollout: Rollout) -> dict[str, Json]:
    return {
        "prompt": rollout.prompt,
        "title": f"{rollout.actor}, {rollout.id}",
        "actions": [
            [action.kind, action.text, float(f"{action.logprob:.4g}"), action.version, action.noise, action.kept]
            for action in rollout.actions
        ],
    }


def _spread(count: int) -> list[int]:
    """Indices of at most `BUCKETS` of `count` points, ascending, with the first one."""
    return [index * count // min(count, BUCKETS) for index in range(min(count, BUCKETS))]


def _rounded(values: Iterable[float]) -> list[Json]:
    return [float(f"{value:.6g}") for value in values]
