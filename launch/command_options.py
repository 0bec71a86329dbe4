"""Arguments and options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from launch.errors import UserError


def path(text: str) -> Path:
    """With `~` expanded, also where the shell leaves it as it is: `--output=~/results`. Parses every option that is a
    path; the help shows its name.
    """
    return Path(os.path.expanduser(text))


Run = Annotated[Path, typer.Argument(parser=path, help="Run folder.")]
RunOrCheckpoint = Annotated[
    Path, typer.Argument(parser=path, metavar="RUN_OR_CHECKPOINT", help="Checkpoint, or run: its result.")
]
StageOfRun = Annotated[
    str | None, typer.Option("--stage", help="Stage of the run; by default the one that its recipe calls the result.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")]

# What `train` and `submit` take.
Recipe = Annotated[
    str | None, typer.Argument(help="YAML recipe; the packaged ones are in launch/recipes/. Not with --resume.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings to change: KEY=VALUE, a stage by its name.", show_default=False)
]
NewName = Annotated[str | None, typer.Option(help="Name of the run; by default the recipe's name with date and time.")]
Resume = Annotated[
    Path | None,
    typer.Option(
        parser=path,
        metavar="RUN",
        help="Go on with this run folder, from its newest checkpoints; KEY=VALUE changes its settings.",
    ),
]
ResumeIfExists = Annotated[
    bool,
    typer.Option(
        "--resume-if-exists",
        help="Start the run that --name names, or go on with it if it is there, as a scheduler's restart needs it.",
    ),
]
EvaluateAfter = Annotated[bool, typer.Option("--evaluate/--no-evaluate", help="Measure the trained models at the end.")]


def recipe_or_resume(
    recipe: str | None, overrides: Sequence[str], resume: Path | None, name: str | None, resume_if_exists: bool
) -> tuple[str | None, Sequence[str]]:
    """The recipe and the overrides of a command that takes `RECIPE [KEY=VALUE ...]` or `--resume RUN [KEY=VALUE ...]`,
    where the first word stands for the recipe, whatever it is.

    Raises:
        UserError: there is a recipe and a run to resume, or neither; or the other options do not go with them.
    """
    if resume is not None and recipe is not None and "=" in recipe:
        overrides, recipe = [recipe, *overrides], None
    if (recipe is None) == (resume is None):
        raise UserError(
            "give either a recipe, e.g. launch/recipes/arithmetic_cpu.yaml, or --resume RUN (runs are below runs/)"
        )
    if resume_if_exists and name is None:
        raise UserError("--resume-if-exists finds the run by its name: give --name NAME too")
    if resume is not None and name is not None:
        raise UserError(f"--name is for a new run; {resume} keeps the name it has")
    return recipe, overrides
