"""Errors that reach the person at the terminal, and the exit codes they end with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from buffer.disk import is_disk_full
from buffer.processes import NoAnswerError, ProcessLostError

EXIT_RUN_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
"""After Ctrl-C."""
EXIT_STOPPED = 75
"""After the signal of a job system (EX_TEMPFAIL of sysexits.h): the same command, or --resume, goes on."""


class UserError(Exception):
    """Something the user can mend. The message says what is wrong and what to do; the command exits with 2."""


class RunFailedError(Exception):
    """A run that started well and could not go on. The message names who failed; the command exits with 1."""


class RunStoppedError(KeyboardInterrupt):
    """A signal stopped a run; its newest step has a checkpoint, and `resume` goes on. It is a KeyboardInterrupt, so
    that `except Exception` of a script does not take a stop for a failure.
    """


@contextmanager
def setting_up() -> Iterator[None]:
    """Around what meets the user's files, models and values: ValueError, OSError and ImportError become UserError, all
    but a full disk, see `launch.commands.reported_errors`.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if is_disk_full(error):
            raise
        raise UserError(str(error)) from None


@contextmanager
def lost_processes_reported() -> Iterator[None]:
    """Around calls to the processes of a run: NoAnswerError and ProcessLostError become RunFailedError."""
    try:
        yield
    except (NoAnswerError, ProcessLostError) as error:
        raise RunFailedError(str(error)) from error
