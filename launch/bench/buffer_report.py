"""The buffer's benchmark as tables."""

from __future__ import annotations

from typing import cast

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_TITLES = {
    "ours": "ours, fsync=none",
    "ours_fsync_batch": "ours, fsync=batch",
    "torchrl": "TorchRL, memory-mapped",
    "torchrl_hand_padded": "TorchRL, padded by hand",
    "cpprb": "cpprb, memory-mapped",
}
_MEASURES = ("insert", "insert_packed", "insert_4_writers", "sample_warm", "sample_cold")
_RATIOS = {"insert_ratio": 3.0, "sample_ratio": 1.5, "disk_ratio": 0.6}


def render_buffer_benchmark(found: dict[str, object]) -> RenderableType:
    """What `bench_buffer` returned: rows per second of each store, ratios with their bars, and costs by size."""
    rates = cast(dict[str, dict[str, float]], found["rows_per_s"])
    disk = cast(dict[str, float], found["disk_bytes_per_row"])
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("rows/s")
    for heading in ("insert", "packed", "4 writers", "sample", "cold", "bytes/row"):
        table.add_column(heading, justify="right")
    for name, title in _TITLES.items():
        table.add_row(title, *(f"{rates[name][measure]:,.0f}" for measure in _MEASURES), f"{disk[name]:,.0f}")
    spread = cast(dict[str, list[float]], found["spread"])
    lines = []
    for name, bar in _RATIOS.items():
        key = f"{name}_to_torchrl"
        low, high = spread[key]
        lines.append(f"{key} {cast(float, found[key]):.2f} ({low:.2f} to {high:.2f}; bar {bar:g})")
    sampling = cast(dict[str, dict[str, float]], found["sampling"])
    costs = ", ".join(f"{cost:.2f} ms at {int(rows):,}" for rows, cost in sampling["draw_ms"].items())
    lines.append(f"a draw by live rows: {costs}")
    lines += [
        f"memory at {point['disk_mib']:,.0f} MiB on disk: {point['anonymous_mib']:,.0f} MiB"
        for point in cast(list[dict[str, float]], found["memory_while_growing"])[-1:]
    ]
    return Group(table, Text("\n".join(lines)), Text(f"load average {found['load_average']}", style="dim"))
