"""The command `sequencematch compare`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from launch.commands import AsJson, path, reported_errors, stdout_kept_clean
from launch.errors import RunFailedError, UserError, setting_up
from launch.stop_signals import stop_exit_code

if TYPE_CHECKING:
    from launch.compare.runs import ComparisonFolder

DEFAULT_SEEDS = 3
PAGE_FILE, COMPARISON_FILE = "compare.html", "compare.json"


def compare(
    recipe: Annotated[Path | None, typer.Argument(parser=path, help="YAML recipe.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings, KEY=VALUE.", show_default=False)] = None,
    objectives: Annotated[str | None, typer.Option(metavar="A,B,...", help="NAME or NAME:KEY=VALUE,...")] = None,
    objectives_file: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="YAML file: labels of objectives, in their place.")
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1, help="Runs of each objective; with --resume: from now on.", show_default=str(DEFAULT_SEEDS)
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Budget; by default as in the recipe.")] = None,
    stage: Annotated[str | None, typer.Option(help="By default the first that learns from rollouts.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the folder of the comparison.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FOLDER", help="Continue this one; finished runs are kept."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the comparison, print its plan, and exit.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train several objectives from the same start at the same budget, evaluate them, and say what is within noise.

    [dim]Example:[/dim] sequencematch compare launch/recipes/arithmetic_cpu.yaml
    --objectives mle,behavior_cloning,sequencematch:alpha=0.1 --seeds 3

    The runs take place one after another. Ctrl-C ends the current one with a checkpoint; --resume continues. Details:
    docs/compare.md.
    """
    with reported_errors(), stdout_kept_clean(as_json):
        if (recipe is None) == (resume is None):
            raise UserError("give either a recipe, e.g. launch/recipes/arithmetic_cpu.yaml, or --resume FOLDER")
        from launch.compare.plan import compared_stage, make_plan, parse_objectives, read_objectives, read_plan
        from launch.settings.recipe import read_recipe

        if recipe is None:
            assert resume is not None
            given = {"--objectives": objectives, "--objectives-file": objectives_file, "--steps": steps}
            given |= {"--stage": stage, "--name": name}
            if fixed := [option for option, value in given.items() if value is not None]:
                raise UserError(f"{fixed[0]} is for a new comparison; {resume} continues with its own plan")
            plan = read_plan(resume, seeds)
        else:
            with setting_up():
                settings = read_recipe(recipe, overrides or [])
                if objectives is not None and objectives_file is None:
                    compared = parse_objectives(objectives, (compared_stage(settings, stage), *settings.stages))
                elif objectives_file is not None and objectives is None:
                    compared = read_objectives(objectives_file)
                else:
                    raise UserError("say what to compare: --objectives mle,sequencematch, or --objectives-file FILE")
                plan = make_plan(settings, compared, seeds or DEFAULT_SEEDS, stage, steps)
            if dry_run:
                typer.echo(plan.to_yaml(), nl=False)
                return
        from launch.compare.runs import ComparisonFolder

        with setting_up():
            folder = ComparisonFolder(resume.resolve(), plan) if resume else ComparisonFolder.create(plan, name)
        failures = _run(folder, Console(stderr=as_json))
    if as_json:
        typer.echo((folder.path / COMPARISON_FILE).read_text(encoding="utf-8"), nl=False)
    if failures:
        raise typer.Exit(1)


def _run(folder: ComparisonFolder, console: Console) -> Mapping[str, str]:
    """Run the comparison; returns the runs that failed, and why. A message after an early end names the command that
    continues it."""
    from launch.compare.results import render_comparison, render_page
    from launch.compare.runs import ComparisonSession
    from launch.run_folder.folder import shown_path, sole_driver

    say = partial(console.print, highlight=False, soft_wrap=True)
    shown = shown_path(folder.path)
    how_to_resume = f"go on with: sequencematch compare --resume {shown}"
    with sole_driver(folder.path):
        folder.write_plan()  # a resumed one may have more seeds
        try:
            comparison = ComparisonSession(folder, console).run()
        except KeyboardInterrupt:
            say(f"interrupted; {how_to_resume}")
            raise typer.Exit(stop_exit_code()) from None
        except (UserError, RunFailedError):
            say(f"the comparison has stopped; {how_to_resume}")
            raise
        (folder.path / COMPARISON_FILE).write_text(comparison.to_json(), encoding="utf-8")
        (folder.path / PAGE_FILE).write_text(render_page(comparison, folder), encoding="utf-8")
    console.print()
    console.print(render_comparison(comparison))
    say(f"\ncomparison: {shown}/{PAGE_FILE}")
    if comparison.failures:
        say(f"runs failed; {how_to_resume}")
    return comparison.failures
