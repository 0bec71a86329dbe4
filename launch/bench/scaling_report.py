"""The simulation of scaling as a table."""

from __future__ import annotations

from itertools import groupby

from pydantic import TypeAdapter
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from launch.bench.scaling import ScalingPoint

_HEADINGS = {
    "ranks": "learner ranks",
    "actors": "",
    "steps/s": "",
    "actions/s": "of all engines",
    "samples/s": "rollouts drawn",
    "/insert": "samples per inserted rollout",
    "stale": "mean and largest staleness",
    "drop": "share dropped as stale",
    "held": "share of time that actors are held back",
    "wait": "share of time that the learner waits for draws",
    "busy": "share of time that the busiest shard works",
}


def render_scaling(found: dict[str, object]) -> RenderableType:
    """What `bench_scaling` returned: a row for each point, then where each number of ranks saturates."""
    points = TypeAdapter(list[ScalingPoint]).validate_python(found["points"])
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("saturated", no_wrap=True)
    for point in points:
        table.add_row(*_cells(point))
    lines = [
        f"{ranks} learner ranks: {_limits(list(of_ranks))}"
        for ranks, of_ranks in groupby(points, key=lambda point: point.ranks)
    ]
    lines += [
        f"{point.actors} actors, {point.ranks} ranks: the run would end: {point.failure}"
        for point in points
        if point.failure is not None
    ]
    notes = [f"stage {found['stage']}, {found['steps']} steps after {found['warmup']}, simulated"]
    notes += [f"{heading}: {meaning}" for heading, meaning in _HEADINGS.items() if meaning]
    return Group(table, Text("\n".join(lines)), Text("; ".join(notes), style="dim"))


def _cells(point: ScalingPoint) -> list[str]:
    ratio = point.samples_per_insert
    return [
        str(point.ranks),
        str(point.actors),
        f"{point.steps_per_s:,.2f}",
        f"{point.actions_per_s:,.0f}",
        f"{point.samples_per_s:,.0f}",
        "-" if ratio is None else f"{ratio:.2f}",
        f"{point.staleness_mean:.1f} {point.staleness_max}",
        f"{point.dropped_share:.0%}",
        f"{point.actors_held_back:.0%}",
        f"{point.learner_waiting:.0%}",
        f"{point.buffer_busy:.0%}",
        "fails" if point.failure is not None else point.saturated,
    ]


def _limits(points: list[ScalingPoint]) -> str:
    """What limits them, from which number of actors on."""
    limits = groupby(points, key=lambda point: point.saturated)
    return ", ".join(f"{resource} from {next(group).actors} actors" for resource, group in limits)
