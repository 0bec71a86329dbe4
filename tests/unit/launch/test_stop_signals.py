"""A stop reaches a command however it was started, and whatever Ray does to signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from buffer.processes import JOB_SIGNALS
from launch.errors import EXIT_INTERRUPTED, EXIT_STOPPED
from launch.stop_signals import (
    STOP_SIGNALS,
    stop_exit_code,
    stop_handlers_kept,
    stop_requested,
    stop_signals_interrupt,
)

PRINT_BLOCKED = "import signal; print(*sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"


@pytest.fixture(autouse=True)
def default_handlers() -> Iterator[None]:
    """Whoever runs the tests may ignore some of these signals."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def start_like_ray() -> None:
    """Set a handler as `ray.init` does; SIGTERM arrives meanwhile."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
    send(signal.SIGTERM)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_reaches_a_process_born_with_the_signal_ignored(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)
    with pytest.raises(KeyboardInterrupt), stop_signals_interrupt():
        send(number)
    assert signal.getsignal(number) is signal.SIG_IGN


@pytest.mark.parametrize("first", STOP_SIGNALS)
def test_only_ctrl_c_interrupts_a_command_that_is_stopping(first: signal.Signals) -> None:
    """Slurm signals the driver and the script, which signals the driver too: one checkpoint is being written."""
    with stop_signals_interrupt():
        assert not stop_requested()
        with pytest.raises(KeyboardInterrupt):
            send(first)
        assert stop_requested()
        for number in JOB_SIGNALS:
            send(number)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert stop_exit_code() == (EXIT_INTERRUPTED if first == signal.SIGINT else EXIT_STOPPED)


def test_each_command_begins_without_a_stop() -> None:
    with pytest.raises(KeyboardInterrupt), stop_signals_interrupt():
        send(signal.SIGTERM)
    with stop_signals_interrupt():
        assert not stop_requested()
    assert stop_exit_code() == EXIT_INTERRUPTED


def test_a_stop_while_ray_starts_is_not_lost() -> None:
    """It is delivered when the handlers of the command are back."""
    with pytest.raises(KeyboardInterrupt), stop_signals_interrupt(), stop_handlers_kept():
        start_like_ray()
    assert stop_exit_code() == EXIT_STOPPED


def interrupt_a_start(times: int, done: list[str]) -> None:
    with stop_signals_interrupt(), stop_handlers_kept():
        for _ in range(times):
            send(signal.SIGINT)
        done.append("Ray stands")


@pytest.mark.parametrize(("times", "expected"), [(1, ["Ray stands"]), (2, [])])
def test_ctrl_c_waits_for_the_start_of_ray_and_a_second_one_does_not(times: int, expected: list[str]) -> None:
    """A start that is cut off leaves threads that crash the process at its end."""
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        interrupt_a_start(times, done)
    assert done == expected
    assert stop_exit_code() == EXIT_INTERRUPTED


def test_rays_handler_does_not_end_the_command() -> None:
    with pytest.raises(KeyboardInterrupt), stop_signals_interrupt(), stop_handlers_kept():
        sys.exit(signal.SIGTERM)
    assert stop_exit_code() == EXIT_STOPPED


def test_a_process_without_ray_starts_none_to_ignore_signals() -> None:
    """As that of a test that makes the service of a shard without Ray."""
    program = (
        "import ray\nfrom buffer.processes import ignore_stop_signals\nignore_stop_signals()\n"
        "print(ray.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"


def test_what_ray_starts_never_receives_the_signals_of_job_systems() -> None:
    with stop_signals_interrupt(), stop_handlers_kept():
        done = subprocess.run([sys.executable, "-c", PRINT_BLOCKED], capture_output=True, text=True, check=True)
    assert {*map(int, done.stdout.split())} >= {*map(int, JOB_SIGNALS)}
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {*JOB_SIGNALS}
