"""What a run would do with other numbers of actors and learner ranks, by simulation (`tests.benchmarks.scaling_model`).

Hardware of its own for each process is assumed; `tests.benchmarks.scaling_plan` tells what a step takes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from launch.errors import UserError
from launch.settings.recipe import read_recipe
from tests.benchmarks.backend import circumstances
from tests.benchmarks.scaling_model import Point, simulate
from tests.benchmarks.scaling_plan import TIMED_RECIPE, StepTimes, make_plan, read_times

COLUMNS = (
    "ranks,actors,steps_per_s=steps_/s,actions_per_s=actions_/s,samples_per_s=samples_/s,samples_per_insert=ratio,"
    "staleness_mean=stale,dropped_fraction=drop,actors_throttled=held,learner_waiting=wait,buffer_busy=busy,"
    "saturated=limit,failure=the run_would_end"
)
SHOWN = {
    f"points[{COLUMNS}]": "simulated; ratio: samples per insert; stale: mean staleness; drop: share of stale rollouts; "
    "held, wait, busy: share of time that actors are throttled, the learner waits, the busiest shard works",
    "stage": "",
    "steps": "",
    "warmup": "",
}


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
    step_times = StepTimes() if times is None else read_times(times)
    plan = make_plan(read_recipe(recipe, overrides or []), stage, step_times, steps, warmup)
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
    busy = {
        "buffer": point["buffer_busy"],
        "learner": point["learner_training"] + point["learner_publishing"],
        "actors": point["actors_generating"] + point["actors_loading"],
    }
    busiest = max(busy, key=lambda name: busy[name])
    pushing = {
        "learner": point["learner_publishing"] > point["learner_training"],
        "actors": point["actors_loading"] > point["actors_generating"],
    }
    return "push" if pushing.get(busiest) else busiest
