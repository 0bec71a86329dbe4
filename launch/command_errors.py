"""From exceptions to the exit codes and the one-line errors of the command line."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from buffer.full_disk import is_disk_full
from launch.errors import EXIT_RUN_FAILED, EXIT_STOPPED, EXIT_USER_ERROR, RunFailedError, UserError
from launch.stop_signals import stop_exit_code, stop_signals_interrupt


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
        _end(f"{error}; make room there, then repeat the command", EXIT_USER_ERROR)
    except KeyboardInterrupt:
        _end("interrupted", stop_exit_code())


@contextmanager
def setting_up() -> Iterator[None]:
    """Around the part of a command that meets what the user gave: files, models, values.

    Raises:
        UserError: in place of ValueError, OSError and ImportError. OSError: a disk is full, see `reported_errors`.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if is_disk_full(error):
            raise
        raise UserError(str(error)) from None


def provide_folder(folder: Path, elsewhere: str) -> None:
    """Make a folder that is to be written, and try it, before anything is computed for it.

    elsewhere: how the person can name another one.

    Raises:
        UserError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"folder {folder} cannot be written ({error.strerror}): {elsewhere}") from None


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


def _end(message: str, code: int) -> None:
    typer.echo(f"error: {' '.join(message.split())}", err=True)  # libraries write messages of many lines
    raise typer.Exit(code)
