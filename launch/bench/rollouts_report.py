"""The rollout benchmark as a table."""

from __future__ import annotations

from typing import cast

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def render_rollout_benchmark(found: dict[str, object]) -> RenderableType:
    """What `bench_rollouts` returned: one row per share of backspaces, and the largest log-probability error."""
    ratios = cast(dict[str, float], found["ratio_to_plain_vllm"])
    speeds = cast(dict[str, dict[str, float]], found["actions_per_s"])
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for heading in ("backspaces", "plain vLLM, actions/s", "with backspace, actions/s", "ratio"):
        table.add_column(heading, justify="right")
    for rate, ratio in ratios.items():
        plain, ours = (f"{speeds[side][rate]:,.0f}" for side in ("plain", "backspace"))
        table.add_row(f"{100 * float(rate):.0f} %", plain, ours, f"{ratio:.3f}")
    error = cast(float | None, found["max_logprob_error"])
    note = (
        "log-probabilities are compared in float32 only"
        if error is None
        else f"largest log-probability error {error:.1e} nats over {found['num_actions_checked']:,} actions"
    )
    return Group(table, Text(f"{note}; model: {found['model']}", style="dim"))
