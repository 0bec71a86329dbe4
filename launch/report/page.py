"""The report of a run as a page; `assets/plots.yaml` names the metrics that share a plot."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from importlib import resources

import numpy as np
import yaml
from pydantic import TypeAdapter

from launch.monitoring.live_view import clock
from launch.report.document import MAX_POINTS, Plot, Series, render_document, thin
from launch.report.evaluation import GROUPS, change_outcome
from launch.report.gather import RUN_STATES, Report, StageMetrics
from launch.settings.recipe import to_yaml
from launch.settings.run import RunSettings
from launch.statistics import Float64
from learner.settings.held_out import ANSWERS_STEP, HELD_OUT_LOSS

SHOWN_EVENTS = 200
MAX_ACTORS = 12
"""Plotted actors, at most; more lines cannot be distinguished."""
ALL_POINTS = 10_000
"""Points of all lines together, to limit the size of the page; each line has at least `MIN_POINTS`."""
MIN_POINTS = 20

ANSWERS_WEIGHTS = {ANSWERS_STEP, "held_out_answers_version"}
"""Metrics that name the weights of answers. They have no plot: answers are plotted at their step."""

_Plan = tuple[str, dict[str, str], str]


def render(report: Report) -> str:
    """The page."""
    settings = report.settings
    max_points = ALL_POINTS // max(1, sum(len(each.values) for each in report.metrics.values()))
    max_points = min(MAX_POINTS, max(MIN_POINTS, max_points))
    groups = _stage_groups(settings, report.metrics)
    state, note = _state(report)
    return render_document(
        "launch.report",
        "report.html.j2",
        "rollouts.js",
        report=report,
        config=to_yaml(settings),
        state=state,
        state_note=note,
        rollout_data=[(rollout.prompt, rollout.actions) for rollout in report.rollouts],
        plots={", ".join(names): metric_plots(report.metrics, names, max_points) for names in groups},
        versions=version_plot(report),
        notable_events=report.notable_events[-SHOWN_EVENTS:],
        group_titles=GROUPS,
        outcome=change_outcome,
    )


def metric_plots(
    metrics: Mapping[str, StageMetrics], stages: Sequence[str], max_points: int = MAX_POINTS
) -> list[Plot]:
    """A plot for each plan and each metric in no plan, if one of `stages` logged it. max_points: of each line."""
    logged = {metric for stage in stages for metric in metrics[stage].values}
    planned = {metric for _, legend, _ in plans().values() for metric in legend}
    found = []
    others: dict[str, _Plan] = {name: ("", {name: name}, "") for name in sorted(logged - planned - ANSWERS_WEIGHTS)}
    for title, (unit, legend, caption) in (plans() | others).items():
        series = []
        for color, stage in enumerate(stages):
            for dash, metric in enumerate(legend):
                if metric not in metrics[stage].values:
                    continue
                line = thin(*_points(metrics[stage], metric), max_points)
                label = stage if len(legend) == 1 else f"{stage}: {legend[metric]}"
                series.append(Series(label, *line, color, dash))
        if series:
            found.append(Plot(title, unit, caption, "step", tuple(series)))
    return found


def _points(metrics: StageMetrics, metric: str) -> tuple[Float64, Float64]:
    """Steps and values of a metric. Only some steps have evaluations; answers belong to an earlier step than the line
    that holds them."""
    steps, values = metrics.steps.astype(np.float64), metrics.values[metric]
    if not metric.startswith("held_out_"):
        return steps, values
    known = np.isfinite(values)
    return (steps if metric == HELD_OUT_LOSS else metrics.values[ANSWERS_STEP])[known], values[known]


@cache
def plans() -> dict[str, _Plan]:
    """By the title of a plot: unit, metrics with their names in the legend, caption."""
    text = (resources.files(__package__) / "assets" / "plots.yaml").read_text(encoding="utf-8")
    return TypeAdapter(dict[str, _Plan]).validate_python(yaml.safe_load(text))


def version_plot(report: Report) -> Plot | None:
    """Versions of the weights at the learner and the actors over time; None without any."""
    versions = report.versions()
    # Before the second version there may be long stages without rollouts, which would fill the plot.
    first = min((version for points in versions.values() for _, version in points), default=0)
    later = {name: [point for point in points if point[1] > first] for name, points in versions.items()}
    versions = {name: points for name, points in later.items() if points} or versions
    names = sorted(versions, key=lambda name: (name != "learner", len(name), name))[: MAX_ACTORS + 1]
    end = report.last_at - report.began_at
    series = []
    for color, name in enumerate(names):
        points = [*versions[name], (max(end, versions[name][-1][0]), versions[name][-1][1])]
        kept = np.linspace(0, len(points) - 1, min(len(points), MAX_POINTS)).round().astype(int)
        x, y = zip(*(points[index] for index in kept), strict=True)
        series.append(Series(name, x, y, color=color))
    left_out = f" Of {len(versions):,} processes {len(names)} are plotted." if len(versions) > len(names) else ""
    caption = f"When the driver saw which version at the learner and at each actor.{left_out}"
    return Plot("Weights over time", "version", caption, "seconds", tuple(series), is_stairs=True) if series else None


def _stage_groups(settings: RunSettings, metrics: Collection[str]) -> list[list[str]]:
    """Stages with a step, grouped by the weights that they start from."""
    groups: dict[str | None, list[str]] = {}
    before = None
    for stage in settings.stages:
        groups.setdefault(stage.start_from or before, []).append(stage.name)
        before = stage.name
    plotted = [[name for name in names if name in metrics] for names in groups.values()]
    return [names for names in plotted if names]


def _state(report: Report) -> tuple[str, str]:
    """The state of the run and a note on it. A run whose log does not end with a state may be running or killed."""
    steps = {name: int(each.steps[-1]) for name, each in report.metrics.items()}
    newest = next((line for line in reversed(report.log) if line.event in RUN_STATES), None)
    state = RUN_STATES[newest.event] if newest else "not finished"
    if state == "finished" or all(steps.get(stage.name, 0) >= stage.steps for stage in report.settings.stages):
        return "finished", ""
    if newest and state == "failed":
        return state, newest.message
    if state == "stopped":
        return state, f"Stopped on request. Continue it with: sequencematch train --resume {report.name}"
    silent = clock(max(0.0, report.made_at - report.last_at))
    return state, f"Running, or killed: its last log line was written {silent} before this report."
