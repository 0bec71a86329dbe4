"""The results of a comparison in three forms: `compare.json`, a table on the terminal, and a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from launch.compare.plan import COMPARED_STAGE
from launch.evaluation.results import CheckpointResult
from launch.report.command import REPORT_FILE
from launch.report.document import COLORS, Plot, Series, render_document
from launch.report.evaluation import GROUPS, METRICS, change_outcome, metric_info
from launch.report.gather import read_metrics
from launch.run_folder.folder import shown_path
from launch.settings.evaluation import SAMPLED
from launch.statistics import CONFIDENCE, MIN_SEEDS, Difference, Estimate, Spread, differences_to, spread

if TYPE_CHECKING:
    from launch.compare.runs import ComparisonFolder

Key = tuple[str, int]
"""Label of an objective, and seed."""

_MARKS = {True: "≈", False: "≠", None: "?"}
_OF_EXAMPLES = "†"
_VERDICT = (
    "≈ within noise, ≠ beyond it: p at most 0.05 with Holm's correction over the objectives, for each number. There is "
    "no correction over the numbers: by chance alone, one in twenty is beyond noise."
)
_OVER_TEMPERATURE = ("accuracy", "mauve", "diversity")
_TEMPERATURE = "temperature="


@dataclass(frozen=True)
class ComparedMetric:
    """A number of all objectives that have it, by label. group: of rollouts, e.g. `top_p=0.9`. name: in the group."""

    group: str
    name: str
    spreads: dict[str, Spread]
    differences: dict[str, Difference]

    @property
    def beyond_noise(self) -> list[str]:
        """The objectives whose difference to the reference is beyond noise."""
        return [label for label, found in self.differences.items() if found.within_noise is False]


@dataclass(frozen=True)
class Comparison:
    """A finished comparison. objectives: labels; the first is the reference. failures: of runs, by their names.

    runs: the evaluated ones. costs: of the same runs, see `stage_cost`.
    """

    task: str
    steps: int
    objectives: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: Mapping[Key, CheckpointResult]
    costs: Mapping[Key, Mapping[str, float]]
    failures: Mapping[str, str]

    @property
    def reference(self) -> str:
        """The objective that the others are compared with."""
        return self.objectives[0]

    def metrics(self) -> list[ComparedMetric]:
        """Every number that an objective has, in the order of the evaluation."""
        found = []
        names = ((group, name) for run in self.runs.values() for group, names in run.metrics.items() for name in names)
        for group, name in dict.fromkeys(names):
            numbers: dict[str, dict[int, Estimate]] = {label: {} for label in self.objectives}
            changes: dict[str, dict[int, Estimate]] = {label: {} for label in self.objectives}
            for (label, seed), run in self.runs.items():
                if (number := run.metrics.get(group, {}).get(name)) is not None:
                    numbers[label][seed] = number
                if (change := run.differences.get(group, {}).get(name)) is not None:
                    changes[label][seed] = change
            spreads = {label: each for label, by_seed in numbers.items() if (each := spread(by_seed)) is not None}
            differences = differences_to(self.reference, numbers, changes)
            found.append(ComparedMetric(group, name, spreads, differences))
        return found

    def to_json(self) -> str:
        """The content of `compare.json`: each run, each objective over seeds, each difference to the reference."""
        tree = {
            "task": self.task,
            "budget": f"{self.steps:,} steps",
            "objectives": list(self.objectives),
            "reference": self.reference,
            "seeds": list(self.seeds),
            "confidence": CONFIDENCE,
            "metrics": [
                {
                    "name": f"{metric.group}.{metric.name}",
                    "objectives": {label: found._asdict() for label, found in metric.spreads.items()},
                    "differences": {label: found.to_json() for label, found in metric.differences.items()},
                }
                for metric in self.metrics()
            ],
            "runs": [
                {
                    "objective": label,
                    "seed": seed,
                    **self.costs[label, seed],
                    "metrics": {
                        f"{group}.{name}": number.to_json()
                        for group, numbers in run.metrics.items()
                        for name, number in numbers.items()
                    },
                }
                for (label, seed), run in self.runs.items()
            ],
            "failures": dict(self.failures),
        }
        return json.dumps(tree, indent=2) + "\n"


def stage_cost(run: Path) -> dict[str, float]:
    """Steps of the compared stage, their actions (experts and rollouts), and seconds, waits for data included."""
    stage = read_metrics(run)[COMPARED_STAGE]
    seconds = stage.values["step_s"]
    actions = round(float((stage.values["actions_per_s"] * seconds).sum()))
    return {"steps": len(stage.steps), "actions": actions, "seconds": float(seconds.sum())}


def render_comparison(comparison: Comparison) -> RenderableType:
    """A block for the costs and for each number, with a line for each objective."""
    count, reference = len(comparison.seeds), comparison.reference
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("", overflow="fold")
    table.add_column("mean", no_wrap=True)
    table.add_column(f"minus {reference}", overflow="fold")
    for name in ("steps", "actions", "seconds"):
        table.add_row(Text(f"trained.{name}", "bold"))
        for label in comparison.objectives:
            if costs := [cost[name] for (each, _), cost in comparison.costs.items() if each == label]:
                table.add_row(f"  {label}", f"{sum(costs) / len(costs):,.0f}", "")
    for metric in comparison.metrics():
        table.add_row(Text(f"{metric.group}.{metric.name}", "bold"))
        scale = max((abs(found.mean) for found in metric.spreads.values()), default=0.0)
        for label in comparison.objectives:
            mean, difference = metric.spreads.get(label), metric.differences.get(label)
            shown = "-" if mean is None else _spread_text(mean, scale)
            minus = Text() if difference is None else _difference_text(difference, scale, count)
            table.add_row(f"  {label}", shown, minus)
    title = f"{comparison.task}: {count} seed{'s' if count > 1 else ''} of each objective, {comparison.steps:,} steps"
    failures = [Text(f"{run} failed: {why}", "red") for run, why in comparison.failures.items()]
    return Group(Text(title, "bold"), table, Text(_caption(count, reference), "dim"), Text(_VERDICT, "dim"), *failures)


def _caption(num_seeds: int, reference: str) -> str:
    if num_seeds < MIN_SEEDS:
        return (
            f"The spread over seeds is unknown: it needs {MIN_SEEDS} seeds, and there are {num_seeds}. In brackets: "
            f"standard error of one run. The 95 % interval of the difference to {reference} comes from the examples "
            "alone; it holds for these runs, not for the objectives."
        )
    return (
        f"± standard deviation over seeds; in brackets: standard error of one run. The difference to {reference} has "
        f"its 95 % interval (Student's t, paired by seed; {_OF_EXAMPLES}: from the examples alone, since the "
        "difference is the same for all seeds, or there are too few seeds)."
    )


def _spread_text(found: Spread, scale: float) -> str:
    deviation = "" if found.deviation is None else f" ±{_number(found.deviation, scale)}"
    error = "" if found.standard_error is None else f" ({_number(found.standard_error, scale)})"
    return f"{_number(found.mean, scale)}{deviation}{error}"


def _difference_text(found: Difference, scale: float, num_seeds: int) -> Text:
    sign = "-" if found.value < 0 else "+"
    interval = "" if found.half_width is None else f" ±{_number(found.half_width, scale)}"
    of_examples = _OF_EXAMPLES if found.basis == "examples" and num_seeds >= MIN_SEEDS else ""
    text = f"{sign}{_number(abs(found.value), scale)}{interval} {_MARKS[found.within_noise]}{of_examples}"
    return Text(text, "bold" if found.within_noise is False else "dim")


def _number(value: float, scale: float) -> str:
    """Format a number with decimals for a largest mean of `scale`; fractions have no leading zero."""
    if scale <= 1.0:
        text = f"{value:.3f}"
        return text.removeprefix("0") if value < 1.0 else text
    return f"{value:.2f}" if scale < 100.0 else f"{value:,.1f}"


def render_page(comparison: Comparison, folder: ComparisonFolder) -> str:
    """The page."""
    metrics = [metric for metric in comparison.metrics() if metric.spreads]
    headlines = [metric for metric in metrics if metric_info(metric.name).is_headline and metric.group in GROUPS]
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
        metric_info=metric_info,
        outcome=change_outcome,
        group_titles=GROUPS,
        min_seeds=MIN_SEEDS,
    )


def temperature_plot(objectives: Sequence[str], metrics: Sequence[ComparedMetric]) -> Plot | None:
    """Curves of the objectives over temperature, for the first of accuracy, MAUVE and diversity with two temperatures.

    They show whether a policy is only sharper: then it scores like one that is sampled at a lower temperature.
    """
    for name in _OVER_TEMPERATURE:
        at = {_temperature_of(metric.group): metric.spreads for metric in metrics if metric.name == name}
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


def _temperature_of(group: str) -> float | None:
    """The temperature of a group of rollouts; None for greedy and other groups, and for those with another ban."""
    if group == SAMPLED:
        return 1.0
    return float(group.removeprefix(_TEMPERATURE)) if group.startswith(_TEMPERATURE) and "," not in group else None
