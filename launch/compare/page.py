"""A comparison as a page: what is beyond noise, every number with its seeds, and curves over the temperature."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import groupby

import yaml

from launch.compare.folder import ComparisonFolder
from launch.compare.plan import RECIPE_KEY, ComparisonPlan
from launch.compare.results import ComparedMetric, Comparison
from launch.compare.temperatures import temperature_plots
from launch.report.command import REPORT_FILE
from launch.report.document import render_document
from launch.report.evaluation import GROUPS, METRICS, MetricInfo, change_outcome
from launch.run_folder.folder import shown_path
from launch.statistics import MIN_SEEDS


def render_page(comparison: Comparison, folder: ComparisonFolder) -> str:
    """The page."""
    metrics = [metric for metric in comparison.metrics() if metric.spreads]
    headlines = [metric for metric in metrics if _info(metric).is_headline and metric.group in GROUPS]
    return render_document(
        "launch.compare",
        "comparison.html.j2",
        ("plots.js",),
        comparison=comparison,
        name=folder.path.name,
        folder=shown_path(folder.path),
        objectives=[(label, _objective_text(folder.plan, label)) for label in comparison.objectives],
        reports=_reports(comparison, folder),
        headlines=headlines or metrics[:3],
        groups=[(name, list(each)) for name, each in groupby(metrics, key=lambda metric: metric.group)],
        findings=[(metric, metric.beyond_noise) for metric in headlines if metric.beyond_noise],
        plots=temperature_plots(comparison.objectives, metrics),
        info_of=_info,
        outcome=change_outcome,
        group_titles=GROUPS,
        has_spread=len(comparison.seeds) >= MIN_SEEDS,
        min_seeds=MIN_SEEDS,
        made_at=time.time(),
    )


def _info(metric: ComparedMetric) -> MetricInfo:
    return METRICS.get(metric.metric, MetricInfo(metric.metric.replace("_", " ")))


def _objective_text(plan: ComparisonPlan, label: str) -> str:
    """As a file of objectives has it, without what is the default."""
    objective, recipe = plan.objectives[label].objective, plan.objectives[label].recipe
    tree = {"name": objective.name} | objective.model_dump(mode="json", exclude_defaults=True)
    tree |= {RECIPE_KEY: list(recipe)} if recipe else {}
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=True, width=1_000_000).strip()


def _reports(comparison: Comparison, folder: ComparisonFolder) -> Mapping[str, list[tuple[int, str]]]:
    """By objective, the seeds whose runs have a report, with its path as seen from the page."""
    found: dict[str, list[tuple[int, str]]] = {}
    for label, seed in comparison.costs:
        page = folder.run(label, seed) / REPORT_FILE
        if page.is_file():
            found.setdefault(label, []).append((seed, page.relative_to(folder.path).as_posix()))
    return found
