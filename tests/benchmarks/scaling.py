"""What a run would do with other numbers of actors and learner ranks, by simulation (`tests.benchmarks.scaling_model`).

Hardware of its own for each process is assumed; `tests.benchmarks.scaling_plan` tells what a step takes.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console

from launch.errors import UserError
from launch.settings.recipe import read_recipe
from tests.benchmarks.backend import circumstances
from tests.benchmarks.scaling_model import Point, simulate
from tests.benchmarks.scaling_plan import TIMED_RECIPE, StepTimes, make_plan, read_times
from tests.benchmarks.table import Table


def bench(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe.")] = TIMED_RECIPE,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change: KEY=VALUE, a stage by its name.", show_default=False)
    ] = None,
    actors: Annotated[str, typer.Option(help="Numbers of actors.")] = "1,2,4,16,64,256",
    ranks: Annotated[str, typer.Option(help="Numbers of learner ranks.")] = "1,8,64",
    batch_per_rank: Annotated[
        bool, typer.Option(help="Batches and buffer of the recipe are for each rank, not for all together.")
    ] = False,
    times: Annotated[
        Path | None,
        typer.Option(help="JSON file with the seconds of each step; by default those of arithmetic_cpu.yaml."),
    ] = None,
    stage: Annotated[str | None, typer.Option(help="Stage to simulate; by default the first with rollouts.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Learner steps that are measured at each point.")] = 100,
    warmup: Annotated[
        int | None, typer.Option(min=0, help="Steps before; by default until the buffer was drawn twice over.")
    ] = None,
) -> dict[str, object]:
    """Simulate a run with other numbers of actors and learner ranks: throughput, staleness, and what saturates.

    In the result, `points` are what `tests.benchmarks.scaling_model.simulate` returns, and what is `saturated`: actors,
    learner, buffer, or push.
    """
    settings = read_recipe(recipe, overrides or [])
    step_times = StepTimes() if times is None else read_times(times)
    plan = make_plan(settings, stage, step_times, steps, warmup)
    all_actors, all_ranks = _numbers("--actors", actors), _numbers("--ranks", ranks)
    points: list[Point] = []
    with Console(stderr=True).status("simulating") as progress:
        for num_ranks in all_ranks:
            sized = plan.with_batches_of(num_ranks) if batch_per_rank else plan
            for num_actors in all_actors:
                progress.update(f"simulating {num_actors} actors, {num_ranks} learner ranks")
                point = simulate(sized, num_actors, num_ranks)
                points.append(point | {"saturated": saturated(point)})
    return {
        "simulated": True,
        "stage": plan.stage.name,
        "steps": plan.steps,
        "warmup": plan.warmup,
        "batch_per_rank": batch_per_rank,
        "times": plan.times.model_dump(mode="json"),
        "points": points,
        **circumstances(),
    }


def _numbers(option: str, text: str) -> list[int]:
    """Of a list such as 1,2,4."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"{option} {text!r} is no list of positive numbers; write it as 1,2,4")
    return [int(part) for part in parts]


def saturated(point: Point) -> str:
    """What has the least time to spare; of the actors' and the learner's, the larger of work and weights counts."""
    actors_busy = point["actors_generating"] + point["actors_loading"]
    learner_busy = point["learner_training"] + point["learner_publishing"]
    busiest = max(actors_busy, learner_busy, point["buffer_busy"])
    if busiest == point["buffer_busy"]:
        return "buffer"
    if busiest == learner_busy:
        return "learner" if point["learner_training"] >= point["learner_publishing"] else "push"
    return "actors" if point["actors_generating"] >= point["actors_loading"] else "push"


def table(found: dict[str, object]) -> Table:
    """A row for each point, then where each number of ranks saturates."""
    points = cast(list[Point], found["points"])
    notes = [
        f"{ranks} learner ranks: {_limits(list(of_ranks))}"
        for ranks, of_ranks in groupby(points, key=lambda point: point["ranks"])
    ]
    notes += [
        f"{point['actors']} actors, {point['ranks']} ranks: the run would end: {point['failure']}"
        for point in points
        if point["failure"] is not None
    ]
    notes += [
        "actions/s: of all engines; samples/s: rollouts drawn; ratio: samples per inserted rollout",
        "stale: mean and largest staleness; drop: share of rollouts dropped as stale",
        "share of time: held: actors are held back; wait: the learner waits; busy: the busiest shard works",
        f"stage {found['stage']}, {found['steps']} steps after {found['warmup']}, simulated",
    ]
    columns = "ranks actors steps/s actions/s samples/s ratio stale drop held wait busy limit"
    return Table(columns.split(), [_cells(point) for point in points], notes)


def _cells(point: Point) -> list[str]:
    ratio = point["samples_per_insert"]
    shares = ("dropped_share", "actors_held_back", "learner_waiting", "buffer_busy")
    return [
        str(point["ranks"]),
        str(point["actors"]),
        f"{point['steps_per_s']:,.2f}",
        f"{point['actions_per_s']:,.0f}",
        f"{point['samples_per_s']:,.0f}",
        "-" if ratio is None else f"{ratio:.2f}",
        f"{point['staleness_mean']:.1f} {point['staleness_max']}",
        *(f"{point[share]:.0%}" for share in shares),
        "fails" if point["failure"] is not None else point["saturated"],
    ]


def _limits(points: list[Point]) -> str:
    """What limits them, from which number of actors on."""
    limits = groupby(points, key=lambda point: point["saturated"])
    return ", ".join(f"{resource} from {next(group)['actors']} actors" for resource, group in limits)
