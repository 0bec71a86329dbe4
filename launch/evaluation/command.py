"""The command `sequencematch evaluate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from launch.commands import AsJson, path, provide_folder, reported_errors, stdout_kept_clean
from launch.errors import UserError, setting_up

if TYPE_CHECKING:
    from launch.evaluation.results import Target
    from launch.settings.evaluation import EvaluationSettings
    from launch.settings.run import RunSettings


def evaluate(
    checkpoints: Annotated[
        list[Path], typer.Argument(parser=path, metavar="RUN_OR_CHECKPOINT", help="Of one model; of a run its result.")
    ],
    against: Annotated[
        Path | None, typer.Option(parser=path, metavar="RUN_OR_CHECKPOINT", help="Baseline; by default the first.")
    ] = None,
    task_from: Annotated[
        Path | None, typer.Option(parser=path, metavar="RUN|RECIPE", help="By default the run above a checkpoint.")
    ] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="Held-out examples, at most.")] = None,
    decoding: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Further ways to decode, with commas: greedy, top_p=P, temperature=T, contrastive[=K:ALPHA], "
            "recovery=K.",
        ),
    ] = None,
    ban_deleted: Annotated[
        Literal["usual", "both"] | None,
        typer.Option(help="Ban tokens that were taken back: in greedy decoding only, or each with and without."),
    ] = None,
    mauve: Annotated[
        Literal["encoder", "model"] | None, typer.Option(help="MAUVE, with these features (needs the extra `mauve`).")
    ] = None,
    mauve_clusters: Annotated[int | None, typer.Option(min=2, help="Ten texts are needed for each.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FOLDER", help="For results and rollouts; by default in the run folder."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure checkpoints on the held-out examples of their task, side by side.

    An evaluation that was interrupted goes on where it was when it is repeated.

    [dim]Examples:[/dim]

    sequencematch evaluate runs/RUN/checkpoints/*/step-000400 --examples 200

    sequencematch evaluate A B --against MLE --decoding greedy,top_p=0.95,temperature=0.7 --mauve encoder
    """
    with reported_errors(), stdout_kept_clean(as_json):
        from launch.evaluation.report import show_evaluation, write_evaluation
        from launch.evaluation.results import EVALUATION_FOLDER
        from launch.evaluation.rollouts import ROLLOUTS_FOLDER
        from launch.evaluation.run import evaluate as evaluate_targets
        from launch.run_folder.checkpoints import checkpoint_of, run_of

        with setting_up():
            settings, run = settings_for(checkpoints[0], task_from), run_of(checkpoints[0])
            keep_in = output or (run and run / EVALUATION_FOLDER)
            checkpoints = [checkpoint_of(each) for each in checkpoints]
            against = None if against is None else checkpoint_of(against)
            others = {"examples": examples, "ban_deleted": ban_deleted}
            chosen = _changed(settings.evaluation, decoding, mauve, mauve_clusters, **others)
            settings = settings.model_copy(update={"evaluation": chosen})
            if against is not None:
                baseline = against.resolve()
                checkpoints = [against, *(each for each in checkpoints if each.resolve() != baseline)]
            targets = labeled(checkpoints)
            if keep_in is not None:
                for folder in (keep_in, keep_in / ROLLOUTS_FOLDER):
                    provide_folder(folder, "keep the rollouts elsewhere with --output FOLDER")
        console = Console(stderr=as_json)
        if keep_in is None:
            console.print("rollouts are not kept, so an interruption loses them: give --output FOLDER", style="dim")
        evaluation = evaluate_targets(targets, settings, console, keep_in)
        if output is not None:
            write_evaluation(evaluation, output)
        if not as_json:
            show_evaluation(evaluation, Console())
    if as_json:
        typer.echo(json.dumps(evaluation.to_json()))


def _changed(
    settings: EvaluationSettings, decoding: str | None, mauve: str | None, mauve_clusters: int | None, **others: object
) -> EvaluationSettings:
    """The recipe's settings with those of the command line; raises ValueError where they are not accepted."""
    from launch.settings.evaluation import MauveSettings, check_decodings

    names = None if decoding is None else tuple(name.strip() for name in decoding.split(","))
    check_decodings(names or ())
    chosen = settings.mauve
    if mauve is not None or mauve_clusters is not None:
        if chosen is None and mauve is None:
            raise ValueError("--mauve-clusters goes with --mauve encoder or --mauve model")
        chosen = (chosen or MauveSettings()).model_copy(update=_given(features=mauve, clusters=mauve_clusters))
    return settings.model_copy(update=_given(decoding=names, mauve=chosen, **others))


def _given(**options: object) -> dict[str, object]:
    return {name: value for name, value in options.items() if value is not None}


def settings_for(checkpoint: Path, task_from: Path | None) -> RunSettings:
    """Settings of a run folder or a recipe; by default of the run that the checkpoint lies in, else UserError."""
    from launch.run_folder.checkpoints import run_of
    from launch.run_folder.folder import open_run_folder
    from launch.settings.recipe import read_recipe

    if task_from is not None:
        return open_run_folder(task_from)[1] if task_from.is_dir() else read_recipe(task_from)
    if not checkpoint.is_dir():
        raise UserError(f"no checkpoint at {checkpoint}")
    run = run_of(checkpoint)
    if run is None:
        raise UserError(f"{checkpoint} does not lie in a run folder: name its task with --task-from RUN or RECIPE")
    return open_run_folder(run)[1]


def labeled(checkpoints: Sequence[Path]) -> list[Target]:
    """Targets with labels as short as tells them apart, at most the paths; UserError where one is named twice."""
    from launch.evaluation.results import Target
    from launch.run_folder.checkpoints import CHECKPOINTS_FOLDER

    folders = [checkpoint.resolve() for checkpoint in checkpoints]
    names = []
    for folder in folders:
        *_, run, kind, stage, step = ("", "", "", *folder.parts)
        names.append((run, stage, step) if kind == CHECKPOINTS_FOLDER else ("", step, step))
    for template in ("{1}", "{1}/{2}", "{0}", "{0}/{1}", "{0}/{1}/{2}", "{3}"):
        labels = [template.format(*each, folder) for each, folder in zip(names, folders, strict=True)]
        if len(set(labels)) == len(labels):
            return [Target(*pair) for pair in zip(labels, checkpoints, strict=True)]
    raise UserError("the same checkpoint is named twice")
