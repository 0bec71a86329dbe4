"""The one way in which the result of every benchmark is shown to people: chosen fields of its JSON object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

Shown = Mapping[str, str]
"""Path of a field, such as `by_cpu_time.insert_ratio_to_torchrl`, to a remark, such as its bar. `points[ranks,step=at]`
shows those columns of a list of objects, perhaps under other headings.
"""


def print_result(found: Mapping[str, object], shown: Shown) -> None:
    """Print each field of `shown`: an object of objects, or a list of them, as a table, anything else as a line; then
    the hardware.
    """
    console = Console()
    for path, remark in {**shown, "hardware": ""}.items():
        name, _, columns = path.rstrip("]").partition("[")
        value: object = found
        for key in name.split("."):
            assert isinstance(value, Mapping)
            value = value[key]
        title = name.replace("_", " ") + (f" ({remark})" if remark else "")
        if isinstance(value, list):
            console.print(_table(title, [("", row) for row in value], columns))
        elif isinstance(value, Mapping) and all(isinstance(each, Mapping) for each in value.values()):
            console.print(_table(title, list(value.items()), columns))
        elif isinstance(value, Mapping):
            console.print(f"{title}: {', '.join(f'{key} {_cell(each)}' for key, each in value.items())}")
        else:
            console.print(f"{title}: {_cell(value)}")


def _table(title: str, rows: Sequence[tuple[str, Mapping[str, object]]], columns: str) -> Table:
    table = Table(box=None, title=title, title_justify="left", padding=(0, 1, 0, 0), header_style="dim")
    chosen = dict(column.partition("=")[::2] for column in columns.split(",") if column)
    names = list(chosen or dict.fromkeys(key for _, row in rows for key in row))
    told = [name for name in names if any(row.get(name) is not None for _, row in rows)]
    table.add_column("")
    for name in told:
        table.add_column((chosen.get(name) or name).replace("_", "\n"), justify="right", overflow="fold")
    for row_name, row in rows:
        table.add_row(row_name.replace("_", " "), *(_cell(row.get(name)) for name in told))
    return table


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if 0 < abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:,.0f}"
