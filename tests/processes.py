"""Processes that a test has started, and waiting for what they do."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable

import psutil


def find_processes(belongs: Callable[[psutil.Process], bool], title: str = "") -> list[psutil.Process]:
    """Living processes of which `belongs` is true and whose command line contains `title`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
            if belongs(process) and process.status() != psutil.STATUS_ZOMBIE and title in " ".join(process.cmdline()):
                found.append(process)
    return found


def in_session_of(leader: int) -> Callable[[psutil.Process], bool]:
    """Whether a process is in the session that the process `leader` has begun."""
    return lambda process: os.getsid(process.pid) == leader


def send_to_all(processes: Iterable[psutil.Process], number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to all that are still there: the death of one ends others."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def wait_until(condition: Callable[[], object], timeout_s: float, what: Callable[[], str] | str) -> None:
    """Until `condition` gives something true; fails after the time-out with `what` was waited for."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what if isinstance(what, str) else what()}"
        time.sleep(0.1)
