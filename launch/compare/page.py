"""A comparison as a page: what is beyond noise, every number with its seeds and intervals, curves over temperature."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import yaml

from launch.compare.arms import RECIPE_KEY
from launch.compare.folder import ComparisonFolder
from launch.compare.plan import ComparisonPlan
from launch.compare.results import ComparedMetric, Comparison
from launch.compare.temperatures import temperature_charts
from launch.report.document import axis_position, render_document
from launch.report.evaluation import GROUPS, METRICS, MetricInfo, Outcome, change_outcome
from launch.report.write import REPORT_FILE
from launch.run_folder.folder import shown_path
from launch.statistics import MIN_SEEDS, Difference, Interval, Spread

_ROOM = 0.06
"""Of an axis beyond its outermost marks, as a share of what lies between them."""


@dataclass(frozen=True)
class ArmNumbers:
    """A line of a panel. values: of its seeds. interval: of the difference to the reference, around the arm's mean.
    outcome: None within noise, and where nothing says which direction is wanted.
    """

    arm: str
    color: int
    spread: Spread
    values: tuple[float, ...]
    interval: Interval
    change: Difference | None
    beyond_noise: bool
    outcome: Outcome | None


@dataclass(frozen=True)
class Panel:
    """One number of every arm that has it. span: ends of its axis. reference: its mean there, or None."""

    group: str
    name: str
    info: MetricInfo
    lines: tuple[ArmNumbers, ...]
    span: tuple[float, float]
    reference: float | None

    @property
    def is_headline(self) -> bool:
        """Whether it can carry the verdict."""
        return self.info.is_headline and self.group in GROUPS

    @property
    def beyond_noise(self) -> tuple[ArmNumbers, ...]:
        """The arms whose difference to the reference chance does not explain."""
        return tuple(line for line in self.lines if line.beyond_noise)


def render_page(comparison: Comparison, folder: ComparisonFolder) -> str:
    """The page."""
    metrics = comparison.metrics()
    panels = [_panel(metric, comparison) for metric in metrics if metric.spreads]
    headlines = [panel for panel in panels if panel.is_headline]
    charts = temperature_charts(comparison.arms, metrics)
    return render_document(
        "launch.compare",
        "comparison.html.j2",
        ("charts.js",),
        comparison=comparison,
        name=folder.path.name,
        folder=shown_path(folder.path),
        arms=[(arm, _arm_text(folder.plan, arm)) for arm in comparison.arms],
        reports=_reports(comparison, folder),
        headlines=headlines or panels[:3],
        groups=[(name, list(each)) for name, each in groupby(panels, key=lambda panel: panel.group)],
        findings=[(panel, lines) for panel in headlines if (lines := panel.beyond_noise)],
        charts=charts,
        data={"stages": [], "charts": {chart.id: chart.data for chart in charts}},
        group_titles=GROUPS,
        has_spread=len(comparison.seeds) >= MIN_SEEDS,
        min_seeds=MIN_SEEDS,
        made_at=time.time(),
        axis=lambda span: partial(axis_position, *span),
    )


def _panel(metric: ComparedMetric, comparison: Comparison) -> Panel:
    group, _, name = metric.name.rpartition(".")
    info = METRICS.get(name, MetricInfo(name.replace("_", " ")))
    lines = []
    for color, arm in enumerate(comparison.arms):
        if (spread := metric.spreads.get(arm)) is None:
            continue
        difference = metric.differences.get(arm)
        lines.append(
            ArmNumbers(
                arm=arm,
                color=color,
                spread=spread,
                values=comparison.values_of(arm, metric.name),
                interval=_around(spread.mean, difference),
                change=difference,
                beyond_noise=difference is not None and difference.within_noise is False,
                outcome=change_outcome(difference, info),
            )
        )
    reference = metric.spreads.get(comparison.reference)
    return Panel(group, name, info, tuple(lines), _span(lines), None if reference is None else reference.mean)


def _around(center: float, difference: Difference | None) -> Interval:
    if difference is None or difference.low is None or difference.high is None:
        return Interval(center, None, None)
    shift = center - difference.value
    return Interval(center, difference.low + shift, difference.high + shift)


def _span(lines: Sequence[ArmNumbers]) -> tuple[float, float]:
    marks = [mark for line in lines for mark in (*line.values, line.interval.low, line.interval.high)]
    numbers = [mark for mark in marks if mark is not None]
    low, high = min(numbers), max(numbers)
    room = _ROOM * (high - low) or 1.0
    return low - room, high + room


def _arm_text(plan: ComparisonPlan, arm: str) -> str:
    """As a file of objectives has it, without what is the default."""
    objective, recipe = plan.arms[arm].objective, plan.arms[arm].recipe
    tree = {"name": objective.name} | objective.model_dump(mode="json", exclude_defaults=True)
    tree |= {RECIPE_KEY: list(recipe)} if recipe else {}
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=True, width=1_000_000).strip()


def _reports(comparison: Comparison, folder: ComparisonFolder) -> Mapping[str, list[tuple[int, str]]]:
    """By arm, the seeds whose runs have a report, with its path as seen from the page."""
    found: dict[str, list[tuple[int, str]]] = {}
    for arm, seed in comparison.costs:
        page = folder.arm(arm, seed) / REPORT_FILE
        if page.is_file():
            found.setdefault(arm, []).append((seed, page.relative_to(folder.path).as_posix()))
    return found
