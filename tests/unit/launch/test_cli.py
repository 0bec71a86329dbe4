"""The command line without a run: help, errors and exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launch.cli import app
from launch.errors import UserError
from launch.evaluation.run import settings_for
from launch.run_folder.folder import LiveCluster, create_run_folder, sole_driver, write_cluster
from launch.settings.recipe import read_recipe

RECIPE = "launch/recipes/arithmetic_cpu.yaml"
HEAVY = ("torch", "ray", "vllm", "transformers", "datasets")
COMMANDS = (
    *("train", "evaluate", "compare", "generate", "export", "report"),
    *("status", "scale", "audit", "query", "submit"),
)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def fails_with(code: int, *arguments: str) -> str:
    """Run a command that must fail with one line on stderr; gives the line."""
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return create_run_folder(read_recipe(Path(RECIPE), [f"runs_folder={tmp_path}/runs"]))


def test_help_and_dry_run_import_nothing_heavy_and_every_command_shows_an_example() -> None:
    program = f"""
import sys
from launch.cli import app
for command in {COMMANDS}:
    app([command, "--help"], standalone_mode=False)
app(["train", "{RECIPE}", "--dry-run"], standalone_mode=False)
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("[]\n")
    shown = " ".join(done.stdout.split())
    assert [command for command in COMMANDS if f" sequencematch {command} " not in shown] == []


def test_version() -> None:
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("sequencematch ")


def test_dry_run_prints_a_recipe_that_reads_back_the_same(tmp_path: Path) -> None:
    result = invoke("train", RECIPE, "actors.count=3", "--dry-run")
    assert result.exit_code == 0
    copy = tmp_path / "copy.yaml"
    copy.write_text(result.stdout)
    assert read_recipe(copy) == read_recipe(Path(RECIPE), ["actors.count=3"])


def test_train_needs_exactly_one_of_recipe_and_resume(run_folder: Path) -> None:
    assert "launch/recipes/" in fails_with(2, "train")
    assert "--resume RUN" in fails_with(2, "train", RECIPE, "--resume", str(run_folder))
    assert "config.yaml" in fails_with(2, "train", "--resume", str(run_folder), "--dry-run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "no recipe at nowhere.yaml"),
        ([RECIPE, "actor.count=2"], "did you mean 'actors'?"),
        ([RECIPE, "actors.count"], "key=value"),
        (["launch/recipes"], "launch/recipes is a folder: name the file of the recipe in it"),
        (["--resume", "nowhere"], "nowhere is not a run folder"),
        ([RECIPE, "runs_folder=README.md"], "README.md"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_train_refuses_bad_input(arguments: list[str], message: str) -> None:
    assert message in fails_with(2, "train", *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", "~/nothing"],
        ["query", "~/nothing"],
        ["export", "~/nothing", "out"],
        ["evaluate", "~/nothing"],
        ["compare", "--resume=~/nothing"],
        ["train", "--resume=~/nothing"],
    ],
    ids=" ".join,
)
def test_a_tilde_is_the_home_folder(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells do not expand it behind `=`, nor in quotes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"{tmp_path}/nothing" in fails_with(2, *arguments)


def test_resuming_a_live_run_is_refused(run_folder: Path) -> None:
    with sole_driver(run_folder):
        assert f"{run_folder} is in use" in fails_with(2, "train", "--resume", str(run_folder))  # it is about to start
        write_cluster(run_folder, LiveCluster("127.0.0.1:1", run_folder.name, os.getpid()))
        assert f"process {os.getpid()} drives it" in fails_with(2, "train", "--resume", str(run_folder))


def test_a_driver_that_was_killed_holds_its_run_no_more(run_folder: Path) -> None:
    """Though a live process has its number, as in a container that was started again."""
    write_cluster(run_folder, LiveCluster("127.0.0.1:1", run_folder.name, os.getpid()))
    holding = (
        "import sys, pathlib, launch.run_folder.folder as t\n"
        "with t.sole_driver(pathlib.Path(sys.argv[1])): print('holds', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holding, str(run_folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == b"holds\n"
        with pytest.raises(UserError, match="is live"), sole_driver(run_folder):
            pass
        killed.kill()
    with sole_driver(run_folder):
        pass


@pytest.mark.parametrize("command", [["status"], ["scale", "--actors", "2"]], ids=" ".join)
def test_a_run_that_is_not_live_says_how_to_go_on(command: list[str], run_folder: Path, tmp_path: Path) -> None:
    assert f"--resume {run_folder}" in fails_with(2, *command, str(run_folder))
    assert "not a run folder" in fails_with(2, *command, str(tmp_path))
    write_cluster(run_folder, LiveCluster("127.0.0.1:1", run_folder.name, 12345))  # by a driver that was killed
    line = fails_with(2, *command, str(run_folder))
    assert "no Ray cluster answers at 127.0.0.1:1" in line
    assert "process 12345" in line
    assert "--resume" in line


@pytest.mark.parametrize("command", [["evaluate"], ["generate", "--prompt", "1"]], ids=" ".join)
def test_what_is_no_checkpoint_is_refused(command: list[str], run_folder: Path, tmp_path: Path) -> None:
    stage = run_folder / "checkpoints" / "pretrain"
    stage.mkdir(parents=True)
    assert "no config.json" in fails_with(2, *command, str(stage))
    (stage / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "no backspace action" in fails_with(2, *command, str(stage))


def test_evaluate_says_where_the_task_could_come_from(tmp_path: Path) -> None:
    assert "no checkpoint at" in fails_with(2, "evaluate", str(tmp_path / "nothing"))
    assert "--task-from" in fails_with(2, "evaluate", str(tmp_path))
    assert "nowhere.yaml" in fails_with(2, "evaluate", str(tmp_path), "--task-from", "nowhere.yaml")


def test_the_script_exits_with_the_code_and_without_a_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "train", "nowhere.yaml"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "error: no recipe at nowhere.yaml; the packaged ones are in launch/recipes/\n"


def test_settings_of_an_evaluation_replace_those_of_the_run(run_folder: Path) -> None:
    overrides = ["evaluation.examples=90", "evaluation.decoding=[top_p=0.9,contrastive=5:0.6]"]
    found = settings_for(run_folder, None, overrides).evaluation
    assert (found.examples, found.decoding) == (90, ("top_p=0.9", "contrastive=5:0.6"))
    run = str(run_folder)
    assert "no decoding 'beam'" in fails_with(2, "evaluate", run, "--decoding", "greedy,beam")
    assert "goes with --mauve" in fails_with(2, "evaluate", run, "--mauve-clusters", "9")
    assert "right or wrong: leave it out" in fails_with(2, "evaluate", run, "--mauve", "model", "--mauve-clusters", "9")
