"""What the commands share: their arguments and options, and the way from an exception to an exit code."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from buffer.disk import is_disk_full
from launch.errors import EXIT_RUN_FAILED, EXIT_STOPPED, EXIT_USER_ERROR, RunFailedError, RunStoppedError, UserError
from launch.stop_signals import stop_exit_code, stop_signals_interrupt


def path(text: str) -> Path:
    """With `~` expanded, also where the shell leaves it as it is: `--output=~/results`. Its name stands in the help."""
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
    """Recipe and overrides: `RECIPE [KEY=VALUE ...]` or `--resume RUN [KEY=VALUE ...]`; the first word stands for
    the recipe, whatever it is. UserError if the options do not go together.
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


@contextmanager
def reported_errors() -> Iterator[None]:
    """Around a whole command: what a person can act on becomes one line; a defect keeps its traceback."""
    try:
        with stop_signals_interrupt():
            yield
    except UserError as error:
        _end(str(error), EXIT_USER_ERROR)
    except RunFailedError as error:
        # A job system that stops the run may end Ray's own processes first.
        _end(str(error), EXIT_STOPPED if stop_exit_code() == EXIT_STOPPED else EXIT_RUN_FAILED)
    except Exception as error:
        if not is_disk_full(error):
            raise
        _end(f"{error}; free space there, then repeat the command", EXIT_USER_ERROR)
    except RunStoppedError:  # the console says how to go on
        raise typer.Exit(stop_exit_code()) from None
    except KeyboardInterrupt:
        _end("interrupted", stop_exit_code())


@contextmanager
def stdout_kept_clean(active: bool) -> Iterator[None]:
    """While active, whatever libraries print, from C++ too, goes to stderr: stdout is for one JSON object."""
    if not active:
        yield
        return
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


def provide_folder(folder: Path, elsewhere: str) -> None:
    """Make a folder and try to write there; UserError if not. elsewhere: how the person can name another one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"folder {folder} cannot be written ({error.strerror}): {elsewhere}") from None


def _end(message: str, code: int) -> None:
    typer.echo(f"error: {' '.join(message.split())}", err=True)  # libraries write messages of many lines
    raise typer.Exit(code)
