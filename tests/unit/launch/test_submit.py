"""Submitting, without a cluster: what is sent, what is refused before, and what the end of a job means."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from ray.job_submission import JobDetails, JobStatus
from typer.testing import CliRunner

from launch.cli import app
from launch.errors import UserError
from launch.run_folder.folder import RAY_JOB_VARIABLE, check_run_name, create_run_folder
from launch.settings.recipe import read_recipe
from launch.submit import (
    PACKAGES,
    RECIPE_FILE,
    choose_submission_id,
    describe_job,
    exit_code_of,
    find_job,
    write_job_tree,
)

RECIPE = Path("launch/recipes/arithmetic_cpu.yaml")
NOBODY = "http://127.0.0.1:1"


def job(state: str, exit_code: int | None = None, message: str = "", **details: object) -> JobDetails:
    known = {"submission_id": "run", "start_time": 100_000, "end_time": 161_000, **details}
    return JobDetails(
        type="SUBMISSION",
        status=JobStatus(state),
        entrypoint="",
        driver_exit_code=exit_code,
        message=message,
        **known,
    )


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    return line


def test_a_job_tree_holds_our_packages_and_the_resolved_recipe_and_runs_by_itself(tmp_path: Path) -> None:
    settings = read_recipe(RECIPE, ["actors.count=3", f"runs_folder={tmp_path}/runs"])
    tree = tmp_path / "tree"
    tree.mkdir()
    write_job_tree(tree, settings)
    assert {path.name for path in tree.iterdir()} == {*PACKAGES, RECIPE_FILE}
    assert not list(tree.rglob("*.pyc"))
    shown = subprocess.run(
        [sys.executable, "-c", "import launch; print(launch.__file__)"],
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert Path(shown.stdout.strip()).is_relative_to(tree)
    assert read_recipe(tree / RECIPE_FILE) == settings


@pytest.mark.parametrize(
    ("state", "exit_code", "command_exit_code"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 1, 1),
        ("FAILED", 2, 2),
        ("FAILED", 130, 130),
        ("FAILED", 75, 75),
        ("FAILED", -9, 1),  # killed
        ("FAILED", None, 1),  # nothing of ours ever ran
        ("STOPPED", None, 75),
    ],
)
def test_the_command_ends_as_the_run_ended(state: str, exit_code: int | None, command_exit_code: int) -> None:
    assert exit_code_of(job(state, exit_code)) == command_exit_code


def test_rays_reason_is_shown_where_the_run_could_not_say_one() -> None:
    assert describe_job(job("FAILED", None, "no such\nnode")) == "run run: FAILED, no such node"
    assert describe_job(job("FAILED", 2, "error: told already")) == "run run: FAILED, exit code 2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([str(RECIPE)], "runs_folder=runs would be lost"),
        ([str(RECIPE), "runs_folder=/r", "actors.cont=3"], "did you mean 'count'"),
        (["nowhere.yaml"], "no recipe at nowhere.yaml"),
        ([], "either a recipe"),
        ([str(RECIPE), "--resume", "/r/x"], "either a recipe"),
        (["--resume", "runs/x"], "runs/x is relative"),
        (["--resume", "/r/x", "--name", "y"], "keeps the name it has"),
        ([str(RECIPE), "runs_folder=/r", "--name", "../x"], "cannot name a run"),
        ([str(RECIPE), "runs_folder=/r", "--resume-if-exists"], "give --name NAME too"),
        ([str(RECIPE), "runs_folder=/r", "--env", "SURELY_NOT_SET"], "SURELY_NOT_SET"),
        ([str(RECIPE), "runs_folder=/r"], "no Ray job server answers at http://127.0.0.1:1"),
        ([str(RECIPE), "runs_folder=/r", "--address", "10.0.0.1:6379"], "http://HEAD:8265"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_submit_refuses_before_it_sends(arguments: list[str], message: str) -> None:
    assert message in refused("submit", "--address", NOBODY, *arguments)


def test_the_newest_job_of_a_run_is_found_by_the_name_of_the_run() -> None:
    mine = {"sequencematch_run": "run"}
    first, second = (
        job("FAILED", metadata=mine),
        job("RUNNING", submission_id="run-2", start_time=170_000, metadata=mine),
    )
    somebody_elses = job("RUNNING", submission_id=None, start_time=180_000)
    assert find_job([second, somebody_elses, first], "run") == second
    assert find_job([first, second], "run-2") == second
    assert find_job([somebody_elses], "run") is None


def test_a_name_is_submitted_again_only_to_resume_its_run_or_after_a_refusal() -> None:
    assert choose_submission_id(None, "run", NOBODY, resuming=False) == "run"
    failed, refused_job = job("FAILED", 1), job("FAILED", 2)
    for before, resuming in ((refused_job, False), (refused_job, True), (failed, True), (None, True)):
        assert re.fullmatch(r"run-\d{8}-\d{6}", choose_submission_id(before, "run", NOBODY, resuming=resuming))
    with pytest.raises(UserError, match=r"has had a run run .*--resume-if-exists"):
        choose_submission_id(failed, "run", NOBODY, resuming=False)
    with pytest.raises(UserError, match=f"is on that cluster already .* `ray job stop run --address {NOBODY}`"):
        choose_submission_id(job("RUNNING"), "run", NOBODY, resuming=True)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "a b"])
def test_names_that_are_no_folders_or_jobs_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="cannot name a run"):
        check_run_name(name)


def test_in_a_job_a_run_has_to_lie_outside_the_jobs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = read_recipe(Path(__file__).parents[3] / RECIPE)
    monkeypatch.setenv(RAY_JOB_VARIABLE, "{}")
    with pytest.raises(UserError, match="runs_folder=runs would be lost"):
        create_run_folder(settings)
    assert not list(tmp_path.iterdir())
