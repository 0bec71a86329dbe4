"""A comparison as a table, the same on a terminal and in markdown, and its files."""

from __future__ import annotations

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from launch.compare.folder import CSV_FILE, HTML_FILE, JSON_FILE, MARKDOWN_FILE, ComparisonFolder
from launch.compare.page import render_page
from launch.compare.results import ComparedMetric, Comparison
from launch.statistics import MIN_SEEDS, Difference, Spread

_MARKS = {True: "≈", False: "≠", None: "?"}
_OF_EXAMPLES = "†"

_Block = tuple[str, list[tuple[str, str, str]]]
"""A heading; and a line for each objective: its label, its numbers, and its difference to the reference."""


def render_comparison(comparison: Comparison) -> RenderableType:
    """The table: a block for each number, with a line for each objective."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("", overflow="fold")
    table.add_column("mean", no_wrap=True)
    table.add_column(f"minus {comparison.reference}", overflow="fold")
    for heading, lines in _blocks(comparison):
        table.add_row(Text(heading, "bold"))
        for label, numbers, difference in lines:
            style = "bold" if "≠" in difference else "dim" if "≈" in difference or "?" in difference else ""
            table.add_row(f"  {label}", numbers, Text(difference, style))
    captions = [Text(line, "dim") for line in _captions(comparison)]
    failures = [Text(f"{run} failed: {why}", "red") for run, why in comparison.failures.items()]
    return Group(Text(_title(comparison), "bold"), table, *captions, *failures)


def comparison_markdown(comparison: Comparison) -> str:
    """The table as GitHub shows it."""
    lines = [f"# {_title(comparison)}", "", f"| | | mean | minus {comparison.reference} |", "|---|---|---|---|"]
    for heading, block in _blocks(comparison):
        lines += [f"| {heading} | {' | '.join(line)} |" for line in block]
    lines += ["", *_captions(comparison)]
    lines += [f"- {run} failed: {why}" for run, why in comparison.failures.items()]
    return "\n".join(lines) + "\n"


def show_comparison(comparison: Comparison, console: Console) -> None:
    """Print the table."""
    console.print(render_comparison(comparison))


def write_comparison(comparison: Comparison, folder: ComparisonFolder) -> None:
    """Write `compare.html`, `compare.json`, `compare.md` and `compare.csv` into the folder of the comparison."""
    (folder.path / JSON_FILE).write_text(comparison.to_json(), encoding="utf-8")
    (folder.path / MARKDOWN_FILE).write_text(comparison_markdown(comparison), encoding="utf-8")
    (folder.path / CSV_FILE).write_text(comparison.to_csv(), encoding="utf-8")
    (folder.path / HTML_FILE).write_text(render_page(comparison, folder), encoding="utf-8")


def _title(comparison: Comparison) -> str:
    count = len(comparison.seeds)
    return f"{comparison.task}: {count} seed{'s' if count > 1 else ''} of each objective, {comparison.budget}"


def _captions(comparison: Comparison) -> list[str]:
    count, reference = len(comparison.seeds), comparison.reference
    verdict = (
        "≈ within noise, ≠ beyond it: p at most 0.05 with Holm's correction for the objectives of a number. Over the "
        "numbers nothing is corrected: of many, one in twenty stands out by chance."
    )
    if count < MIN_SEEDS:
        return [
            f"Nothing can be said about the spread over seeds: {count} of the {MIN_SEEDS} that it takes. In brackets: "
            f"standard error of one run. The difference to {reference} has the 95 % interval that the examples alone "
            "leave; it is about these very runs, not about the objectives.",
            verdict,
        ]
    return [
        f"± standard deviation over seeds; in brackets: standard error of one run. The difference to {reference} has "
        f"its 95 % interval (Student's t, paired by seed; {_OF_EXAMPLES}: from the examples alone, since all seeds "
        "differ alike or are too few).",
        verdict,
    ]


def _blocks(comparison: Comparison) -> list[_Block]:
    """What the runs took, then every number."""
    costs = {label: cost for label in comparison.objectives if (cost := comparison.mean_cost(label)) is not None}
    took = [
        (f"trained.{name}", [(label, f"{getattr(cost, name):,.0f}", "") for label, cost in costs.items()])
        for name in ("steps", "actions", "seconds")
    ]
    return [*took, *(_block(metric, comparison) for metric in comparison.metrics())]


def _block(metric: ComparedMetric, comparison: Comparison) -> _Block:
    largest = max((abs(found.mean) for found in metric.spreads.values()), default=0.0)
    lines = []
    for label in comparison.objectives:
        spread, difference = metric.spreads.get(label), metric.differences.get(label)
        lines.append(
            (
                label,
                "-" if spread is None else _spread_text(spread, largest),
                "" if difference is None else _difference_text(difference, largest, len(comparison.seeds)),
            )
        )
    return metric.name, lines


def _spread_text(found: Spread, scale: float) -> str:
    deviation = "" if found.deviation is None else f" ±{_number(found.deviation, scale)}"
    error = "" if found.standard_error is None else f" ({_number(found.standard_error, scale)})"
    return f"{_number(found.mean, scale)}{deviation}{error}"


def _difference_text(found: Difference, scale: float, num_seeds: int) -> str:
    sign = "-" if found.value < 0 else "+"
    interval = "" if found.half_width is None else f" ±{_number(found.half_width, scale)}"
    of_examples = _OF_EXAMPLES if found.basis == "examples" and num_seeds >= MIN_SEEDS else ""
    return f"{sign}{_number(abs(found.value), scale)}{interval} {_MARKS[found.within_noise]}{of_examples}"


def _number(value: float, scale: float) -> str:
    """With the decimals that suit a number whose largest mean is `scale`; fractions without the zero at the front."""
    if scale <= 1.0:
        text = f"{value:.3f}"
        return text.removeprefix("0") if value < 1.0 else text
    return f"{value:.2f}" if scale < 100.0 else f"{value:,.1f}"
