"""Starting and resuming by the command line, up to where Ray would start: what is refused leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launch.cli import app
from launch.evaluation.report import EVALUATION_FILE
from launch.report.write import REPORT_FILE
from launch.run_folder.folder import METRICS_FILE, create_run_folder, open_run_folder, sole_driver
from launch.settings.recipe import read_recipe
from tests.checkpoints import progress_at, write_progress
from tests.run_folders import write_metrics

RECIPE = "launch/recipes/arithmetic_cpu.yaml"
REFUSED = "cluster.address=127.0.0.1:1"
"""A setting that the driver refuses, once it has the run folder."""


def train(runs: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["train", RECIPE, f"runs_folder={runs}", *arguments])


def begin(folder: Path) -> None:
    """A run that has taken steps."""
    settings = read_recipe(Path(RECIPE), [f"runs_folder={folder.parent}", REFUSED])
    create_run_folder(settings, folder.name)
    write_metrics(folder)


def finish_stages(folder: Path) -> None:
    """Give a run the final checkpoints of all stages, as far as they are looked at."""
    _, settings = open_run_folder(folder)
    for stage in settings.stages:
        write_progress(settings, folder, progress_at(stage.steps, stage=stage.name, stage_steps=stage.steps))


@pytest.mark.parametrize("flags", [[], ["--resume-if-exists"]])
def test_a_refused_start_leaves_nothing_that_blocks_the_mended_command(tmp_path: Path, flags: list[str]) -> None:
    for _ in range(2):
        result = train(tmp_path, "--name", "mine", REFUSED, *flags)
        assert result.exit_code == 2
        assert "no Ray cluster answers" in result.stderr
        assert not list(tmp_path.iterdir())


def test_a_refused_resumption_keeps_all_of_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    begin(folder)
    before = set(folder.rglob("*"))
    result = train(tmp_path, "--name", "mine", REFUSED, "--resume-if-exists")
    assert (result.exit_code, "no Ray cluster answers" in result.stderr) == (2, True)
    assert before <= set(folder.rglob("*"))
    result = train(tmp_path, "--name", "mine", REFUSED)
    assert (result.exit_code, "--resume-if-exists" in result.stderr) == (2, True)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    begin(folder)
    finish_stages(folder)
    metrics = (folder / METRICS_FILE).read_bytes()
    _, settings = open_run_folder(folder)
    last = settings.stages[-1]
    labels = settings.evaluation.stages or (last.name,)
    steps = {stage.name: stage.steps for stage in settings.stages}
    checkpoints = [{"label": name, "checkpoint": f"elsewhere/step-{steps[name]:06d}"} for name in labels]
    (folder / EVALUATION_FILE).write_text(json.dumps({"checkpoints": checkpoints}))
    for command in (["--name", "mine", REFUSED, "--resume-if-exists"], ["--resume", str(folder)]):
        result = CliRunner().invoke(app, ["train", *command]) if "--resume" in command else train(tmp_path, *command)
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout == "run mine is finished: no stage is left to train\n"
    assert (folder / METRICS_FILE).read_bytes() == metrics
    assert not (folder / REPORT_FILE).exists()


def test_an_evaluation_that_fails_loses_nothing_of_the_training(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    begin(folder)
    finish_stages(folder)  # of checkpoints without a model
    result = CliRunner().invoke(app, ["train", "--resume", str(folder)])
    assert (result.exit_code, "config.json" in result.stderr) == (2, True)
    output = " ".join(result.stdout.split())
    assert "training is done" in output
    for stage in ("sequencematch", "mle_control"):
        assert f"{folder}/checkpoints/{stage}/step-000400" in output
    assert f"sequencematch train --resume {folder}" in output
    assert (folder / REPORT_FILE).exists()


def test_a_run_that_a_driver_has_is_left_to_it(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    begin(folder)
    with sole_driver(folder):
        result = train(tmp_path, "--name", "mine", REFUSED, "--resume-if-exists")
    assert (result.exit_code, "in use by another process" in result.stderr) == (2, True)


def test_resume_if_exists_needs_a_name(tmp_path: Path) -> None:
    result = train(tmp_path, "--resume-if-exists")
    assert (result.exit_code, "give --name NAME too" in result.stderr) == (2, True)
