"""The command `sequencematch compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from launch.command_errors import reported_errors, setting_up, stdout_kept_clean
from launch.command_options import AsJson, path
from launch.errors import RunFailedError, UserError
from launch.stop_signals import stop_exit_code

if TYPE_CHECKING:
    from launch.compare.folder import ComparisonFolder
    from launch.compare.results import Comparison

DEFAULT_SEEDS = 3


def compare(
    recipe: Annotated[Path | None, typer.Argument(parser=path, help="YAML recipe.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change: KEY=VALUE, as for train.", show_default=False)
    ] = None,
    objectives: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...", help="NAME, or NAME:KEY=VALUE,KEY=VALUE; the others are held against the first."
        ),
    ] = None,
    objectives_file: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FILE", help="YAML file that maps labels to objectives, in their place."),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Runs of each objective; 3 or more tell how they spread. With --resume: from now on.",
            show_default=str(DEFAULT_SEEDS),
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Budget: learner steps; by default as in the recipe.")
    ] = None,
    actions: Annotated[
        int | None, typer.Option(min=1, help="Budget instead: actions trained on, experts and rollouts together.")
    ] = None,
    stage: Annotated[
        str | None, typer.Option(help="Stage to compare in; by default the first that learns from rollouts.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the folder of the comparison.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FOLDER", help="Go on with this comparison; what is done stays."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check it, print what would be done, and leave.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train several objectives from the same start at the same budget, evaluate them, and say what is within noise.

    [dim]Example:[/dim] sequencematch compare launch/recipes/arithmetic_cpu.yaml
    --objectives mle,behaviour_cloning,sequencematch:alpha=0.1 --seeds 3

    One run after the other. Ctrl-C ends the one under way with a checkpoint; --resume goes on. How: docs/compare.md.
    """
    with reported_errors(), stdout_kept_clean(as_json):
        if (recipe is None) == (resume is None):
            raise UserError("give either a recipe, e.g. launch/recipes/arithmetic_cpu.yaml, or --resume FOLDER")
        from launch.compare.folder import JSON_FILE, ComparisonFolder
        from launch.compare.plan import compared_stage, make_plan, parse_objectives, read_objectives, read_plan
        from launch.settings.recipe import read_recipe

        if resume is not None:
            given = {"--objectives": objectives, "--objectives-file": objectives_file, "--steps": steps}
            given |= {"--actions": actions, "--stage": stage, "--name": name}
            if fixed := [option for option, value in given.items() if value is not None]:
                raise UserError(f"{fixed[0]} is for a new comparison; {resume} goes on as it was begun")
            folder = ComparisonFolder(resume.resolve(), read_plan(resume, seeds))
        else:
            assert recipe is not None
            with setting_up():
                settings = read_recipe(recipe, overrides or [])
                if objectives is not None and objectives_file is None:
                    compared = parse_objectives(objectives, (compared_stage(settings, stage), *settings.stages))
                elif objectives_file is not None and objectives is None:
                    compared = read_objectives(objectives_file)
                else:
                    raise UserError("say what to compare: --objectives mle,sequencematch, or --objectives-file FILE")
                num_seeds = seeds or DEFAULT_SEEDS
                plan = make_plan(settings, compared, num_seeds, stage=stage, steps=steps, actions=actions)
                if dry_run:
                    typer.echo(plan.to_yaml(), nl=False)
                    return
                folder = ComparisonFolder.create(plan, name)
        comparison = _run(folder, Console(stderr=as_json))
        if as_json:
            text = (folder.path / JSON_FILE).read_text(encoding="utf-8")
    if as_json:
        typer.echo(text, nl=False)
    if comparison.failures:
        raise typer.Exit(1)


def _run(folder: ComparisonFolder, console: Console) -> Comparison:
    """All of it; whatever ends it early, it can be resumed, and the message gives the command for that."""
    from launch.compare.folder import HTML_FILE
    from launch.compare.session import ComparisonSession
    from launch.compare.table import show_comparison, write_comparison
    from launch.run_folder.folder import shown_path, sole_driver

    shown = shown_path(folder.path)
    how_to_resume = f"go on with: sequencematch compare --resume {shown}"
    with sole_driver(folder.path):
        folder.write_plan()  # a resumed one may have more seeds
        try:
            comparison = ComparisonSession(folder, console).run()
        except KeyboardInterrupt:
            console.print(f"interrupted; {how_to_resume}", highlight=False, soft_wrap=True)
            raise typer.Exit(stop_exit_code()) from None
        except (UserError, RunFailedError):
            console.print(f"the comparison has stopped; {how_to_resume}", highlight=False, soft_wrap=True)
            raise
        write_comparison(comparison, folder)
    console.print()
    show_comparison(comparison, console)
    console.print(f"\ncomparison: {shown}/{HTML_FILE}", highlight=False, soft_wrap=True)
    if comparison.failures:
        console.print(f"runs failed; {how_to_resume}", highlight=False, soft_wrap=True)
    return comparison
