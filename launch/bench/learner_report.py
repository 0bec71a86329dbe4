"""The learner's benchmarks as tables."""

from __future__ import annotations

from typing import cast

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def render_learner_benchmark(found: dict[str, object]) -> RenderableType:
    """What `bench_learner` returned: a row per load, and a line on the sizes of micro-batches."""
    speeds = cast(dict[str, dict[str, float]], found["actions_per_s"])
    by_size = cast(dict[str, float], found["nodes_per_s"])
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("trained tokens/s")
    for heading in ("ours", "HF Trainer", "ratio", "TRL SFT", "ratio"):
        table.add_column(heading, justify="right")
    for load, title in (("plain", "nothing shared"), ("shared_prompt", "8 texts share half their tokens")):
        rates = speeds[load]
        ours = rates["ours"]
        cells = [f"{ours:,.0f}"]
        for rival in ("hf_trainer", "trl_sft"):
            rate = rates.get(rival)
            cells += ["", ""] if rate is None else [f"{rate:,.0f}", f"{ours / rate:.2f}"]
        table.add_row(title, *cells)
    sizes = ", ".join(f"{rate:,.0f} at {int(size):,}" for size, rate in by_size.items())
    sharing = f"sharing ratio {cast(float, found['sharing_ratio']):.2f}"
    return Group(
        table,
        Text(f"nodes/s by nodes per micro-batch: {sizes}", style="dim"),
        Text(f"{sharing}; model: {found['model']}; load average {found['load_average']}", style="dim"),
    )


def render_memory_benchmark(found: dict[str, object]) -> RenderableType:
    """What `bench_learner_memory` returned, in a sentence."""
    extra = cast(dict[str, float], found["extra_peak_mib"])
    return Text(
        f"extra peak memory of {found['num_nodes']:,} states x {found['vocab_size']:,} actions: "
        f"{extra['ours']:,.0f} MiB; of the plain loss: {extra['plain']:,.0f} MiB; "
        f"ratio {cast(float, found['ratio_to_plain_loss']):.3f}"
    )
