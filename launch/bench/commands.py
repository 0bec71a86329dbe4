"""The commands `sequencematch bench ...`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console, RenderableType

from launch.command_errors import reported_errors, setting_up, stdout_kept_clean
from launch.command_options import AsJson, path
from launch.errors import UserError

ModelShape = Literal["smollm2-135m", "tiny"]
WeightDtype = Literal["float32", "bfloat16"]

bench_app = typer.Typer(no_args_is_help=True, help="Measure the parts of the system.")


@bench_app.command("rollouts")
def bench_rollouts(
    checkpoint: Annotated[
        Path | None, typer.Option(parser=path, help="Checkpoint to measure with; by default a tiny random model.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rollouts at a time.")] = 64,
    num_actions: Annotated[int, typer.Option("--actions", min=1, help="Actions per rollout.")] = 128,
    repetitions: Annotated[int, typer.Option(min=1, help="Measurements of each pair; the best ones count.")] = 5,
    dtype: Annotated[str, typer.Option(help="Number format of the engines.")] = "float32",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare rollouts that take tokens back with plain vLLM: actions per second, and exactness.

    [dim]Example:[/dim] sequencematch bench rollouts --json
    """
    with reported_errors(), stdout_kept_clean(as_json):
        from actors.engine.machine import check_machine
        from launch.bench.rollouts import bench_rollouts as measure

        with setting_up():
            check_machine(enforce_eager=True)
        if checkpoint is None:
            found = measure(batch=batch, num_actions=num_actions, repetitions=repetitions, dtype=dtype, seed=seed)
        else:
            from launch.generation import open_checkpoint

            with setting_up():
                opened = open_checkpoint(checkpoint)
            found = measure(
                str(checkpoint),
                contract=opened.contract,
                batch=batch,
                num_actions=num_actions,
                repetitions=repetitions,
                dtype=dtype,
                seed=seed,
            )
    from launch.bench.rollouts_report import render_rollout_benchmark

    _show(found, as_json, render_rollout_benchmark)


@bench_app.command("learner")
def bench_learner(
    checkpoint: Annotated[
        Path | None,
        typer.Option(parser=path, help="Model to train, in Hugging Face format; by default a small random one."),
    ] = None,
    batch: Annotated[int, typer.Option(min=8, help="Texts per step, a multiple of 8.")] = 32,
    length: Annotated[int, typer.Option(min=4, help="Tokens per text.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps per measurement.")] = 3,
    repetitions: Annotated[int, typer.Option(min=1, help="Measurements of each side; medians count.")] = 5,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare training with Hugging Face's Trainer and TRL's SFTTrainer: trained tokens per second.

    Needs the extra `bench` (trl).

    [dim]Example:[/dim] sequencematch bench learner --json
    """
    with reported_errors(), stdout_kept_clean(as_json):
        from launch.bench.learner import prepare_learner_benchmark

        model_dir = None if checkpoint is None else str(checkpoint)
        with setting_up():
            benchmark = prepare_learner_benchmark(
                model_dir, batch=batch, length=length, steps=steps, repetitions=repetitions, seed=seed
            )
        found = benchmark.measure()
    from launch.bench.learner_report import render_learner_benchmark

    _show(found, as_json, render_learner_benchmark)


@bench_app.command("learner_memory")
def bench_learner_memory(
    num_nodes: Annotated[int, typer.Option("--nodes", min=1, help="States with a value.")] = 4096,
    vocab_size: Annotated[int, typer.Option("--vocabulary", min=8, help="Rows of the output embedding.")] = 49_152,
    as_json: AsJson = False,
) -> None:
    """Compare the memory of action values with that of the plain loss.

    [dim]Example:[/dim] sequencematch bench learner_memory --json
    """
    with reported_errors(), stdout_kept_clean(as_json):
        from launch.bench.learner_memory import bench_learner_memory as measure

        found = measure(num_nodes=num_nodes, vocab_size=vocab_size)
    from launch.bench.learner_report import render_memory_benchmark

    _show(found, as_json, render_memory_benchmark)


@bench_app.command("buffer")
def bench_buffer(
    num_rows: Annotated[int, typer.Option("--rows", min=256, help="Rollouts per store and repetition.")] = 20_000,
    repetitions: Annotated[int, typer.Option(min=1, help="Measurements of each store; medians count.")] = 5,
    largest_scale: Annotated[
        int, typer.Option("--scale", min=10_000, help="Most live rows at which the cost of a draw is measured.")
    ] = 1_000_000,
    grow_gib: Annotated[
        float, typer.Option(min=0.0, help="Size to which a store grows while its memory is watched; 0 = not at all.")
    ] = 0.5,
    with_service: Annotated[
        bool, typer.Option("--service", help="Measure our store behind its Ray actor, too.")
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option(parser=path, help="Where the stores put their files; a temporary folder by default."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare the replay store with TorchRL's and cpprb's memory-mapped buffers: rows per second, bytes on disk.

    Needs the extra `bench` (torchrl, cpprb).

    [dim]Example:[/dim] sequencematch bench buffer --json
    """
    with reported_errors(), stdout_kept_clean(as_json):
        from launch.bench.buffer import bench_buffer as measure

        scales = [scale for scale in (10_000, 100_000, 1_000_000) if scale <= largest_scale]
        grow_bytes = int(grow_gib * 2**30)
        found = measure(
            num_rows=num_rows,
            repetitions=repetitions,
            scales=scales,
            grow_bytes=grow_bytes,
            with_service=with_service,
            folder=folder,
            seed=seed,
        )
    from launch.bench.buffer_report import render_buffer_benchmark

    _show(found, as_json, render_buffer_benchmark)


@bench_app.command("weights")
def bench_weights(
    shape: Annotated[ModelShape, typer.Option("--model", help="Shape of the random model.")] = "smollm2-135m",
    repetitions: Annotated[int, typer.Option(min=1, help="Publications that count; medians count.")] = 7,
    dtype: Annotated[WeightDtype, typer.Option(help="Number format of weights and engine.")] = "float32",
    with_engine: Annotated[bool, typer.Option("--engine/--no-engine", help="Load into a real engine, too.")] = True,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Push weights to one actor and to three, against a memory copy of the same bytes (docs/weights.md).

    [dim]Example:[/dim] sequencematch bench weights --json
    """
    with reported_errors(), stdout_kept_clean(as_json):
        from actors.engine.machine import check_machine
        from launch.bench.weights import bench_weights as measure

        if with_engine:
            with setting_up():
                check_machine(enforce_eager=True)
        found = measure(
            shape,
            repetitions=repetitions,
            dtype=dtype,
            with_engine=with_engine,
            seed=seed,
        )
    from launch.bench.weights_report import render_weight_benchmark

    _show(found, as_json, render_weight_benchmark)


@bench_app.command("scaling")
def bench_scaling(
    recipe: Annotated[
        Path | None, typer.Argument(parser=path, help="YAML recipe; by default the packaged arithmetic_cpu.yaml.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change: KEY=VALUE, a stage by its name.", show_default=False)
    ] = None,
    simulated: Annotated[
        bool, typer.Option("--simulate", help="Real pool, buffer and limiter; engines and learner as slow as told.")
    ] = False,
    actors: Annotated[str, typer.Option(help="Numbers of actors.")] = "1,2,4,16,64,256",
    ranks: Annotated[str, typer.Option(help="Numbers of learner ranks.")] = "1,8,64",
    batch_per_rank: Annotated[
        bool, typer.Option(help="Batches and buffer of the recipe are for each rank, not for all together.")
    ] = False,
    times: Annotated[
        Path | None,
        typer.Option(
            parser=path, help="JSON file with the seconds of each step; by default those of the recipe above."
        ),
    ] = None,
    stage: Annotated[str | None, typer.Option(help="Stage to simulate; by default the first with rollouts.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Learner steps that are measured at each point.")] = 100,
    warmup: Annotated[
        int | None, typer.Option(min=0, help="Steps before; by default until the buffer was drawn twice over.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Simulate a run with other numbers of actors and learner ranks: throughput, staleness, and what saturates.

    [dim]Example:[/dim] sequencematch bench scaling --simulate RECIPE --actors 1,4,16 buffer.samples_per_insert=1
    """
    with reported_errors(), stdout_kept_clean(as_json):
        from launch.bench.scaling import bench_scaling as simulate
        from launch.bench.scaling import make_plan
        from launch.bench.scaling_times import TIMED_RECIPE, StepTimes, read_times
        from launch.settings.recipe import read_recipe

        if not simulated:
            raise UserError(
                "many actors and ranks on one machine can only be simulated: add --simulate; what a real run does, "
                "`sequencematch status RUN` and RUN/metrics.jsonl tell"
            )
        with setting_up():
            settings = read_recipe(recipe or TIMED_RECIPE, overrides or [])
            step_times = StepTimes() if times is None else read_times(times)
            plan = make_plan(settings, stage, step_times, steps, warmup)
            all_actors, all_ranks = _numbers("--actors", actors), _numbers("--ranks", ranks)
        with Console(stderr=True).status("simulating") as progress:
            found = simulate(
                plan,
                all_actors,
                all_ranks,
                batch_per_rank,
                lambda actors, ranks: progress.update(f"simulating {actors} actors, {ranks} learner ranks"),
            )
    from launch.bench.scaling_report import render_scaling

    _show(found, as_json, render_scaling)


def _numbers(option: str, text: str) -> list[int]:
    """Of a list such as 1,2,4."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"{option} {text!r} is no list of positive numbers; write it as 1,2,4")
    return [int(part) for part in parts]


def _show(found: dict[str, object], as_json: bool, render: Callable[[dict[str, object]], RenderableType]) -> None:
    if as_json:
        typer.echo(json.dumps(found))
    else:
        Console().print(render(found))
