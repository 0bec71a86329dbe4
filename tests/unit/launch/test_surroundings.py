"""Containers without a home folder, terminals without UTF-8, long temporary folders, folders that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli import app
from launch.errors import UserError
from launch.surroundings import MAX_SOCKET_FOLDER_BYTES, provide_home, provide_socket_folder
from tests.run_folders import new_run, write_metrics

STRANGER = 12345
"""A user that no file knows."""

AS_STRANGER = f"""
import os, sys
from launch.cli import app
app(["report", sys.argv[1], "--output", sys.argv[2] + "/first.html"], standalone_mode=False)  # imports what it needs
os.setgroups([])
os.setgid({STRANGER})
os.setuid({STRANGER})
os.environ.pop("HOME") if sys.argv[3] == "unset" else os.environ.update(HOME=sys.argv[3])
for name in ("USER", "LOGNAME", "LNAME", "USERNAME"):
    os.environ.pop(name, None)
import getpass, pathlib
from launch.surroundings import provide_home
provide_home()
provide_home()  # has all it needs now, and says nothing more
home = pathlib.Path.home()
(home / "cache").mkdir()
print(home, home.stat().st_uid, oct(home.stat().st_mode), getpass.getuser())
app(["report", sys.argv[1], *sys.argv[4:]])
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that other users can enter; pytest's own is private."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("home", ["/", "unset"])
def test_a_user_without_home_and_name_is_given_both(open_folder: Path, home: str) -> None:
    run = new_run(open_folder / "run")
    write_metrics(run)
    theirs = open_folder / "theirs"
    theirs.mkdir()
    theirs.chmod(0o777)
    command = [sys.executable, "-c", AS_STRANGER, str(run), str(open_folder), home]
    environment = {**os.environ, "TMPDIR": str(theirs)}
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    given = f"{theirs}/sequencematch-home-{STRANGER}"
    assert f"{given} {STRANGER} 0o40700 user-{STRANGER}\n" in refused.stdout
    note, error = refused.stderr.splitlines()
    assert note == f"home folder {'~' if home == 'unset' else '/'} cannot be written: using {given}"
    assert error == (
        f"error: folder {run} cannot be written (Permission denied): write the page elsewhere with --output FILE"
    )
    assert refused.returncode == 2
    Path(given, "cache").rmdir()
    written = subprocess.run(
        [*command, f"--output={theirs}/page.html"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (written.returncode, Path(theirs, "page.html").stat().st_uid) == (0, STRANGER)


def test_a_folder_that_somebody_else_could_have_prepared_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", "/proc/nothing")
    prepared = tmp_path / f"sequencematch-home-{os.getuid()}"
    prepared.mkdir()
    prepared.chmod(0o777)
    provide_home()
    given = Path(os.environ["HOME"])
    assert (given.parent, given.stat().st_mode & 0o777) == (tmp_path, 0o700)
    assert given != prepared
    assert capsys.readouterr().err == f"home folder /proc/nothing cannot be written: using {given}\n"


@pytest.mark.parametrize("length", [MAX_SOCKET_FOLDER_BYTES, MAX_SOCKET_FOLDER_BYTES + 1])
def test_sockets_go_where_their_path_is_short_enough(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = "/" + (length - 1) * "x"
    monkeypatch.setenv("RAY_TMPDIR", "")  # noted for what comes after
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", folder)
    provide_socket_folder()
    used = os.environ.get("RAY_TMPDIR", folder)
    path = f"{used}/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
    assert len(path) <= 107
    assert (used == folder) == (length == MAX_SOCKET_FOLDER_BYTES)
    monkeypatch.setenv("RAY_TMPDIR", "/" + 60 * "x")
    with pytest.raises(UserError, match=r"RAY_TMPDIR=/x+ is too long .* at most 39 bytes"):
        provide_socket_folder()


PRINTING = """
import sys
from pathlib import Path
from rich.console import Console
import launch.cli
from launch.evaluation.report import show_evaluation
from launch.statistics import Estimate
from launch.evaluation.results import CheckpointResult, Evaluation, ShownRollout
from launch.monitoring.live_view import LiveView
from launch.rollout_view import RolloutView, Segment
from launch.surroundings import tolerate_terminal
from tests.unit.launch.test_live_view import view_of_a_running_stage

tolerate_terminal()
segments = Segment("\\U0001f469\\u200d", True, False), Segment("e", False, True)
rollout = RolloutView("caf\\u00e9 \\u6771", segments, "length")
numbers = {name: {"accuracy": Estimate(0.5, 0.1, 8)} for name in ("sampled", "greedy", "recovery")}
shown = tuple(ShownRollout(group, rollout, right) for group in ("sampled", "recovery") for right in (True, False, None))
results = tuple(CheckpointResult(label, Path(label), numbers, shown) for label in ("a", "b"))
for terminal in (False, True):
    console = Console(force_terminal=terminal, width=80)
    show_evaluation(Evaluation.of("t", 8, 0, results, {}, {}), console)
    with LiveView(console, view_of_a_running_stage()) as live:
        live.refresh()
        live.say("\\u2713")
print("\\u2713", file=sys.stderr)
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_everything_is_printed_on_any_terminal(encoding: str) -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": encoding, "PYTHONPATH": "."}
    done = subprocess.run(
        [sys.executable, "-c", PRINTING], env=environment, capture_output=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr.decode(encoding)) == (0, "\u2713\n" if encoding == "utf-8" else "?\n")
    output = done.stdout.decode(encoding)
    assert "pretrain" in output
    assert ("caf\u00e9" if encoding != "ascii" else "caf?") in output


BEGUN = """
import locale, sys
from launch.surroundings import use_utf8
use_utf8()
print(locale.getpreferredencoding(False), sys.stdout.encoding, sys.argv[1:], "\\u2713")
"""


@pytest.mark.parametrize("encoding", ["ascii", "iso8859-1"])
def test_files_are_read_as_utf8_in_any_locale(encoding: str) -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment["PYTHONIOENCODING"] = encoding
    command = [sys.executable, "-c", BEGUN, "an argument"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"utf-8 {encoding} ['an argument'] ?\n"


def test_what_cannot_be_written_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    checkpoint = new_run(tmp_path / "run") / "checkpoints" / "pretrain" / "step-000001"
    checkpoint.mkdir(parents=True)
    result = CliRunner().invoke(app, ["evaluate", "--examples=2", str(checkpoint), "--output=/proc/nothing"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: folder /proc/nothing cannot be written (")
    assert "elsewhere with --output" in result.stderr
