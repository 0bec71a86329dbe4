"""Options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from launch.errors import UserError

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")]

StageOfRun = Annotated[
    str | None, typer.Option("--stage", help="Stage of the run; by default the one that its recipe calls the result.")
]


def split_overrides(
    recipe: str | None, overrides: Sequence[str], resume: Path | None
) -> tuple[str | None, Sequence[str]]:
    """The recipe and the overrides of a command that takes `RECIPE [KEY=VALUE ...]` or `--resume RUN [KEY=VALUE ...]`,
    where the first word stands for the recipe, whatever it is.

    Raises:
        UserError: there is a recipe and a run to resume, or neither.
    """
    if resume is not None and recipe is not None and "=" in recipe:
        return None, [recipe, *overrides]
    if (recipe is None) == (resume is None):
        raise UserError(
            "give either a recipe, e.g. launch/recipes/arithmetic_cpu.yaml, or --resume RUN (runs are below runs/)"
        )
    return recipe, overrides


def path(text: str) -> Path:
    """With `~` expanded, also where the shell leaves it as it is: `--output=~/results`. Parses every option that is a
    path; the help shows its name.
    """
    return Path(os.path.expanduser(text))
