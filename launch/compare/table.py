"""A comparison as a table on the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from launch.compare.results import Comparison
from launch.statistics import MIN_SEEDS, Difference, Spread

_MARKS = {True: "≈", False: "≠", None: "?"}
_OF_EXAMPLES = "†"
_VERDICT = (
    "≈ within noise, ≠ beyond it: p at most 0.05 with Holm's correction for the objectives of a number. Over the "
    "numbers nothing is corrected: of many, one in twenty stands out by chance."
)


def render_comparison(comparison: Comparison) -> RenderableType:
    """A block for what the runs took and for each number, with a line for each objective."""
    count, reference = len(comparison.seeds), comparison.reference
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("", overflow="fold")
    table.add_column("mean", no_wrap=True)
    table.add_column(f"minus {reference}", overflow="fold")
    for name in ("steps", "actions", "seconds"):
        table.add_row(Text(f"trained.{name}", "bold"))
        for label in comparison.objectives:
            if costs := [run.cost[name] for (each, _), run in comparison.runs.items() if each == label]:
                table.add_row(f"  {label}", f"{sum(costs) / len(costs):,.0f}", "")
    for metric in comparison.metrics():
        table.add_row(Text(f"{metric.group}.{metric.name}", "bold"))
        scale = max((abs(found.mean) for found in metric.spreads.values()), default=0.0)
        for label in comparison.objectives:
            spread, difference = metric.spreads.get(label), metric.differences.get(label)
            mean = "-" if spread is None else _spread_text(spread, scale)
            minus = Text() if difference is None else _difference_text(difference, scale, count)
            table.add_row(f"  {label}", mean, minus)
    title = f"{comparison.task}: {count} seed{'s' if count > 1 else ''} of each objective, {comparison.steps:,} steps"
    failures = [Text(f"{run} failed: {why}", "red") for run, why in comparison.failures.items()]
    return Group(Text(title, "bold"), table, Text(_caption(count, reference), "dim"), Text(_VERDICT, "dim"), *failures)


def _caption(num_seeds: int, reference: str) -> str:
    if num_seeds < MIN_SEEDS:
        return (
            f"Nothing can be said about the spread over seeds: {num_seeds} of the {MIN_SEEDS} that it takes. In "
            f"brackets: standard error of one run. The difference to {reference} has the 95 % interval that the "
            "examples alone leave; it is about these very runs, not about the objectives."
        )
    return (
        f"± standard deviation over seeds; in brackets: standard error of one run. The difference to {reference} has "
        f"its 95 % interval (Student's t, paired by seed; {_OF_EXAMPLES}: from the examples alone, since all seeds "
        "differ alike or are too few)."
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
    """With the decimals that suit a number whose largest mean is `scale`; fractions without the zero at the front."""
    if scale <= 1.0:
        text = f"{value:.3f}"
        return text.removeprefix("0") if value < 1.0 else text
    return f"{value:.2f}" if scale < 100.0 else f"{value:,.1f}"
