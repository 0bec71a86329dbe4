"""Exit codes, and a stdout that belongs to one JSON object."""

from __future__ import annotations

import errno
import os
import signal

import pytest
import typer

from launch.commands import reported_errors, stdout_kept_clean
from launch.errors import RunFailedError, UserError, setting_up


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("mend it"), 2, "error: mend it\n"),
        (RunFailedError("actor-0 died"), 1, "error: actor-0 died\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (
            OSError(errno.ENOSPC, "full", "/disk"),
            2,
            "error: [Errno 28] full: '/disk'; free space there, then repeat the command\n",
        ),
    ],
)
def test_exit_codes(error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, reported_errors():
        raise error
    assert ended.value.exit_code == code
    assert capsys.readouterr().err == line


def test_a_run_that_loses_processes_to_the_signal_that_stops_it_was_stopped() -> None:
    def stop_and_fail() -> None:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        raise RunFailedError("the learner died")

    with pytest.raises(typer.Exit) as ended, reported_errors():
        stop_and_fail()
    assert ended.value.exit_code == 75


@pytest.mark.parametrize("defect", [ValueError("defect"), OSError(errno.EIO, "defect")])
def test_a_defect_keeps_its_traceback(defect: Exception) -> None:
    with pytest.raises(type(defect), match="defect"), reported_errors():
        raise defect


def test_what_set_up_meets_is_the_users_but_for_defects() -> None:
    for error in (ValueError("no"), FileNotFoundError("no"), ImportError("no")):
        with pytest.raises(UserError, match="no"), setting_up():
            raise error
    with pytest.raises(ZeroDivisionError), setting_up():
        raise ZeroDivisionError


@pytest.mark.parametrize("active", [True, False])
def test_library_output_does_not_reach_stdout(active: bool, capfd: pytest.CaptureFixture[str]) -> None:
    with stdout_kept_clean(active):
        os.write(1, b"chatter\n")
    os.write(1, b"{}\n")
    out, err = capfd.readouterr()
    assert (out, err) == (("{}\n", "chatter\n") if active else ("chatter\n{}\n", ""))
