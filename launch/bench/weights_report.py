"""The weight benchmark as a table."""

from __future__ import annotations

from typing import cast

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

Times = dict[str, dict[str, float]]


def render_weight_benchmark(found: dict[str, object]) -> RenderableType:
    """What `bench_weights` returned: every part in milliseconds, for one actor and for three, and the ratios."""
    one, three = cast(Times, found["one_actor_s"]), cast(Times, found["three_actors_s"])
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("")
    for heading in ("one actor, ms", "three actors, ms"):
        table.add_column(heading, justify="right")
    for part in one:
        table.add_row(part.replace("_", " "), _span(one, part), _span(three, part))
    ratios = {name: cast(float, found[name]) for name in found if "ratio" in name and found[name] is not None}
    note = ", ".join(f"{name.replace('_', ' ')} {ratio:.2f}" for name, ratio in ratios.items())
    size_gb = cast(int, found["size_bytes"]) / 1e9
    return Group(table, Text(f"{note}; model: {found['model']}, {found['dtype']}, {size_gb:.2f} GB", style="dim"))


def _span(times: Times, part: str) -> str:
    if part not in times:
        return "-"
    median, least, largest = (1e3 * times[part][name] for name in ("median", "least", "largest"))
    return f"{median:,.1f} ({least:,.1f}-{largest:,.1f})"
