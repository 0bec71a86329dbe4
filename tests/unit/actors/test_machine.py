"""What the machine lacks is named with the Debian package that brings it; an eager engine needs no compiler."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from actors.engine import checks
from actors.engine.checks import check_machine
from launch.cli import app

RECIPE = "launch/recipes/arithmetic_cpu.yaml"


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "KERNEL_LIBRARIES", {"libnowhere.so.7": "libnowhere7"})


def test_a_library_that_does_not_load_is_named_with_its_package(no_library: None) -> None:
    with pytest.raises(ValueError, match=r"vLLM needs libnowhere\.so\.7 .*: `apt-get install libnowhere7` brings it"):
        check_machine(enforce_eager=True)


@pytest.mark.usefixtures("no_compiler")
def test_a_compiler_is_needed_where_compilation_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_machine(enforce_eager=True)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / name))
    expected = r"a compiler \(/nowhere/c\+\+\) and Python's headers \(Python\.h\) .*`apt-get install g\+\+ python3-dev`"
    with pytest.raises(ValueError, match=expected):
        check_machine(enforce_eager=False)
    (tmp_path / "include").mkdir()
    (tmp_path / "include/Python.h").touch()
    monkeypatch.setenv("CXX", sys.executable)
    check_machine(enforce_eager=False)


@pytest.mark.usefixtures("no_compiler", "no_library")
@pytest.mark.parametrize(
    ("command", "missing"),
    [
        (["train", RECIPE, "actors.enforce_eager=false", "--no-evaluate", "runs_folder={}"], "libnowhere7 g++"),
        (["train", RECIPE, "actors.enforce_eager=false", "runs_folder={}"], "libnowhere7 g++"),
        (["generate", "nowhere", "--prompt", "1"], "libnowhere7"),
    ],
)
def test_a_command_with_an_engine_names_all_before_anything_starts(command, missing, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [argument.format(tmp_path) for argument in command])
    assert done.exit_code == 2
    assert f"`apt-get install {missing}" in done.stderr
    assert not list(tmp_path.iterdir())
