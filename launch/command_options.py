"""Options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")]

StageOfRun = Annotated[
    str | None, typer.Option("--stage", help="Stage of the run; by default the one that its recipe calls the result.")
]


def path(text: str) -> Path:
    """With `~` expanded, also where the shell leaves it as it is: `--output=~/results`. Parses every option that is a
    path; the help shows its name.
    """
    return Path(os.path.expanduser(text))
