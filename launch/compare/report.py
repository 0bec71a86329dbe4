"""A comparison as a table, on a terminal and in markdown, and its files."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from launch.compare.folder import CSV_FILE, HTML_FILE, JSON_FILE, MARKDOWN_FILE, ComparisonFolder
from launch.compare.page import render_page
from launch.compare.results import ComparedMetric, Comparison, to_json_text
from launch.statistics import MIN_SEEDS, Difference, Spread

MAX_WIDTH = 100
"""Of a table, in columns, where the terminal is wider; arms that do not fit into one have another."""

_HEADING_WIDTH = 17
_GAP = 2
_MARKS = {True: "≈", False: "≠", None: "?"}
_OF_EXAMPLES = "†"

_Row = tuple[str, dict[str, list[str]]]
"""A name, and the lines of each arm's cell."""


def render_comparison(comparison: Comparison, terminal_width: int) -> RenderableType:
    """The tables of a comparison: a row for each number, a column for each arm."""
    sections = _sections(comparison)
    parts: list[RenderableType] = [Text(_title(comparison), "bold")]
    parts += [
        _table(sections, arms) for arms in _columns_that_fit(comparison, sections, min(MAX_WIDTH, terminal_width))
    ]
    parts += [Text(line, "dim") for line in _captions(comparison)]
    parts += [Text(f"{run} failed: {why}", "red") for run, why in comparison.failures.items()]
    return Group(*parts)


def show_comparison(comparison: Comparison, console: Console) -> None:
    """Print the tables."""
    console.print(render_comparison(comparison, console.width))


def write_comparison(comparison: Comparison, folder: ComparisonFolder) -> None:
    """Write `compare.html`, `compare.json`, `compare.md` and `compare.csv` into the folder of the comparison."""
    (folder.path / JSON_FILE).write_text(to_json_text(comparison), encoding="utf-8")
    (folder.path / MARKDOWN_FILE).write_text(comparison_markdown(comparison), encoding="utf-8")
    (folder.path / CSV_FILE).write_text(comparison.to_csv(), encoding="utf-8")
    (folder.path / HTML_FILE).write_text(render_page(comparison, folder), encoding="utf-8")


def comparison_markdown(comparison: Comparison) -> str:
    """The tables of a comparison as GitHub shows them: one for each group of numbers, with a row for each arm, of which
    there may be many.
    """
    lines = [f"# {_title(comparison)}"]
    for section, rows in _sections(comparison):
        lines += ["", f"## {section}", "", f"| | {' | '.join(name for name, _ in rows)} |"]
        lines.append(f"|{'---|' * (len(rows) + 1)}")
        for arm in comparison.arms:
            cells = ["<br>".join(of_arm.get(arm, ["-"])) for _, of_arm in rows]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
    lines += ["", *_captions(comparison)]
    lines += [f"- {run} failed: {why}" for run, why in comparison.failures.items()]
    return "\n".join(lines) + "\n"


def _title(comparison: Comparison) -> str:
    count = len(comparison.seeds)
    return f"{comparison.task}: {count} seed{'s' if count > 1 else ''} of each arm, {comparison.budget}"


def _captions(comparison: Comparison) -> list[str]:
    count, reference = len(comparison.seeds), comparison.reference
    verdict = (
        "≈ within noise, ≠ beyond it: p at most 0.05 with Holm's correction for the arms of a row. Over the rows "
        "nothing is corrected: of many, one in twenty stands out by chance. Without a second line all arms are equal."
    )
    if count < MIN_SEEDS:
        return [
            f"Nothing can be said about the spread over seeds: {count} of the {MIN_SEEDS} that it takes. In brackets: "
            f"standard error of one run. Second line: difference to {reference}, with the 95 % interval that the "
            "examples alone leave; it is about these very runs, not about the objectives.",
            verdict,
        ]
    return [
        "± standard deviation over seeds; in brackets: standard error of one run. Second line: difference to "
        f"{reference} with its 95 % interval (Student's t, paired by seed; {_OF_EXAMPLES}: from the examples alone, "
        "since all seeds differ alike or are too few).",
        verdict,
    ]


def _sections(comparison: Comparison) -> list[tuple[str, list[_Row]]]:
    """Costs, and the numbers of each group of the evaluation."""
    sections: dict[str, list[_Row]] = {"trained": _cost_rows(comparison)}
    for metric in comparison.metrics():
        group, _, name = metric.name.rpartition(".")  # of `top_p=0.9.accuracy` the last
        sections.setdefault(group, []).append((name, _cells(metric, len(comparison.seeds))))
    return list(sections.items())


def _cost_rows(comparison: Comparison) -> list[_Row]:
    costs = {arm: found for arm in comparison.arms if (found := comparison.costs_of(arm))}
    rows: list[_Row] = []
    for name in ("steps", "actions", "seconds"):
        means = {arm: sum(getattr(cost, name) for cost in each) / len(each) for arm, each in costs.items()}
        rows.append((name, {arm: [f"{mean:,.0f}"] for arm, mean in means.items()}))
    return [("runs", {arm: [str(len(each))] for arm, each in costs.items()}), *rows]


def _cells(metric: ComparedMetric, num_seeds: int) -> dict[str, list[str]]:
    largest = max((abs(found.mean) for found in metric.spreads.values()), default=0.0)
    cells = {arm: [_spread_text(found, largest)] for arm, found in metric.spreads.items()}
    differ = any(found.value for found in metric.differences.values())
    if differ or any(found.standard_error for found in metric.spreads.values()):
        for arm, found in metric.differences.items():
            cells[arm].append(_difference_text(found, largest, num_seeds))
    return cells


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
    """With the decimals that suit a row whose largest mean is `scale`; shares without the zero before the point."""
    if scale <= 1.0:
        text = f"{value:.3f}"
        return text.removeprefix("0") if value < 1.0 else text
    return f"{value:.2f}" if scale < 100.0 else f"{value:,.1f}"


def _columns_that_fit(
    comparison: Comparison, sections: Sequence[tuple[str, list[_Row]]], width: int
) -> Iterator[list[str]]:
    """Arms of one table after the other; each table begins with the reference."""
    between = _GAP + 1  # the box draws a divider of its own
    rows = [row for _, section in sections for row in section]
    names = max(len(name) for name, _ in rows) + 2
    widths = {
        arm: max(len(line) for lines in [*(cells.get(arm, [""]) for _, cells in rows), _heading(arm)] for line in lines)
        for arm in comparison.arms
    }
    fixed = names + between + widths[comparison.reference]
    columns, used = [comparison.reference], fixed
    for arm in comparison.arms[1:]:
        if used + between + widths[arm] > width and len(columns) > 1:
            yield columns
            columns, used = [comparison.reference], fixed
        columns.append(arm)
        used += between + widths[arm]
    yield columns


def _heading(arm: str) -> list[str]:
    return textwrap.wrap(arm, _HEADING_WIDTH)


def _table(sections: Sequence[tuple[str, list[_Row]]], arms: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, _GAP, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("", no_wrap=True)
    for arm in arms:
        table.add_column("\n".join(_heading(arm)), justify="right", vertical="top", no_wrap=True)
    for section, rows in sections:
        table.add_row(Text(section, "bold"))
        for name, cells in rows:
            table.add_row(f"  {name}", *(_cell(cells.get(arm, ["-"])) for arm in arms))
    return table


def _cell(lines: Sequence[str]) -> Text:
    """Differences beyond noise stand out."""
    return Text("\n").join(
        Text(line, "bold" if "≠" in line else "dim" if "≈" in line or "?" in line else "") for line in lines
    )
