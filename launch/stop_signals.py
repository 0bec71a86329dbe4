"""What asks a command to stop: Ctrl-C, and the signals by which job systems and terminals say it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from buffer.processes import JOB_SIGNALS
from launch.errors import EXIT_INTERRUPTED, EXIT_STOPPED

STOP_SIGNALS = (signal.SIGINT, *JOB_SIGNALS)

_received: list[int] = []
"""Stop signals of the command so far, oldest first. A list, since handlers belong to the process as a whole."""


@contextmanager
def stop_signals_interrupt() -> Iterator[None]:
    """While active, a stop signal raises KeyboardInterrupt in the main thread. Called by another thread, it changes
    nothing: Python allows signal handlers to the main thread alone.

    A job system may send several signals, from several places: after the first one only Ctrl-C raises again. The
    handlers are set explicitly, because a process that a script starts in the background inherits an ignored SIGINT.
    """
    _received.clear()
    before = {number: signal.signal(number, _interrupt) for number in STOP_SIGNALS if _is_main_thread()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_handlers_kept() -> Iterator[None]:
    """Around `ray.init` and `ray.shutdown`, which set SIGTERM handlers of their own.

    Processes that Ray starts meanwhile never receive the signals of job systems: a signal mask is inherited, and
    neither Ray's servers nor Python reset it. Ctrl-C waits until the body is done, since an interrupted `ray.init`
    leaves threads that crash the process at its end; a second one does not wait.
    """
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS if _is_main_thread()}
    on_interrupt, num_interrupts = before.get(signal.SIGINT), 0

    def defer(number: int, frame: FrameType | None) -> None:
        nonlocal num_interrupts
        num_interrupts += 1
        if num_interrupts > 1:
            raise KeyboardInterrupt

    if callable(on_interrupt):
        signal.signal(signal.SIGINT, defer)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        yield
    except SystemExit:  # by that handler: a thread of a library received the signal
        _received.append(signal.SIGTERM)
        raise KeyboardInterrupt from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if num_interrupts and callable(on_interrupt):
        on_interrupt(signal.SIGINT, None)


def stop_requested() -> bool:
    """Whether the command has received a stop signal."""
    return bool(_received)


def stop_exit_code() -> int:
    """The exit code of a command that a signal stopped: the one that came first decides."""
    return EXIT_STOPPED if _received and _received[0] != signal.SIGINT else EXIT_INTERRUPTED


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _interrupt(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    if len(_received) == 1 or number == signal.SIGINT:
        raise KeyboardInterrupt
