"""Starting and resuming by the command line, up to where Ray would start: what is refused leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launch.cli import app
from launch.evaluation.report import write_evaluation
from launch.evaluation.results import CheckpointResult, Evaluation
from launch.monitoring.run_log import LOG_FILE
from launch.report.command import REPORT_FILE
from launch.run_folder.checkpoints import stage_checkpoints
from launch.run_folder.folder import (
    METRICS_FILE,
    USED_CONFIGS_FOLDER,
    create_run_folder,
    open_run_folder,
)
from launch.settings.recipe import read_recipe
from launch.settings.run import RunSettings
from learner.checkpoints.store import note_durable
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
    results = [CheckpointResult(name, Path(f"elsewhere/step-{steps[name]:06d}"), {}) for name in labels]
    write_evaluation(Evaluation.of("arithmetic", 0, 0, results, {}, {}), folder)
    for command in (["--name", "mine", REFUSED, "--resume-if-exists"], ["--resume", str(folder)]):
        result = CliRunner().invoke(app, ["train", *command]) if "--resume" in command else train(tmp_path, *command)
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.startswith("run mine is finished: no stage is left to train (stages.mle_control.steps")
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


def resume(folder: Path, *overrides: str) -> Result:
    return CliRunner().invoke(app, ["train", "--resume", str(folder), *overrides])


def used_configs(folder: Path) -> list[RunSettings]:
    return [read_recipe(path) for path in sorted((folder / USED_CONFIGS_FOLDER).iterdir())]


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run that has trained all its stages, and evaluated nothing."""
    folder = tmp_path / "mine"
    begin(folder)
    finish_stages(folder)
    return folder


def test_a_change_is_named_written_down_and_kept(finished: Path) -> None:
    """Up to the end of a run of which nothing is left to train, so that no Ray starts."""
    first = resume(finished, "--no-evaluate", "actors.count=2", "learner.alarms.max_backspace_rate=0.4")
    assert (first.exit_code, first.stderr) == (0, "")
    named = "changed since the run was last started: "
    assert first.stdout.splitlines()[:2] == [
        f"{named}learner.alarms.max_backspace_rate: 0.35 -> 0.4",
        f"{named}actors.count: 1 -> 2",
    ]
    log = [json.loads(line)["message"] for line in (finished / LOG_FILE).read_text().splitlines()]
    assert log[-1] == "resumed with another setting: actors.count: 1 -> 2"
    again = resume(finished, "--no-evaluate")
    assert (again.exit_code, "changed" in again.stdout) == (0, False)
    assert [settings.actors.count for settings in used_configs(finished)] == [1, 2]
    assert open_run_folder(finished)[1] == used_configs(finished)[1]


def test_what_cannot_change_is_refused_by_name_however_it_was_changed(finished: Path) -> None:
    config = finished / "config.yaml"
    written = config.read_bytes()
    result = resume(finished, "seed=9", "actors.count=2", "model.hidden_size=48")
    assert result.exit_code == 2
    assert "seed: 0 -> 9 (the steps so far were taken with it)" in result.stderr
    assert "model.hidden_size: 96 -> 48 (the checkpoints hold" in result.stderr
    assert "actors.count" not in result.stderr
    assert "did you mean 'actors'" in resume(finished, "actor.count=2").stderr
    assert config.read_bytes() == written
    config.write_text(written.decode().replace("hidden_size: 96", "hidden_size: 48"))
    assert "model.hidden_size: 96 -> 48" in resume(finished).stderr
    assert len(used_configs(finished)) == 1


def test_more_steps_are_taken_or_refused_aloud(finished: Path) -> None:
    pretrain = resume(finished, "stages.pretrain.steps=10000")
    assert (pretrain.exit_code, "stage sequencematch has begun with the weights" in pretrain.stderr) == (2, True)
    fewer = resume(finished, "stages.mle_control.steps=3")
    assert (fewer.exit_code, "the stage has taken 400 steps" in fewer.stderr) == (2, True)
    idle = resume(finished, "stages.mle_control.optimizer.learning_rate=1e-4")
    assert (idle.exit_code, "raise stages.mle_control.steps" in idle.stderr) == (2, True)
    more = resume(finished, "stages.mle_control.steps=500", "stages.mle_control.optimizer.learning_rate=1e-4")
    assert (more.exit_code, "no Ray cluster answers" in more.stderr) == (2, True), "it begins to train, and needs Ray"
    assert len(used_configs(finished)) == 1, "the refusal took the change back"
    assert open_run_folder(finished)[1] == used_configs(finished)[0]


def test_a_run_without_a_step_is_started_anew_with_other_settings(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    create_run_folder(read_recipe(Path(RECIPE), [f"runs_folder={tmp_path}", REFUSED]), "mine")
    (folder / "buffer" / "shard-000").mkdir(parents=True)
    result = train(tmp_path, "--name", "mine", "--resume-if-exists", REFUSED, "seed=9")
    assert (result.exit_code, "no Ray cluster answers" in result.stderr) == (2, True)
    assert not (folder / "buffer").exists()


def test_the_recipe_of_a_repeated_command_counts(finished: Path) -> None:
    result = train(finished.parent, "--name", "mine", "--resume-if-exists", "--no-evaluate", REFUSED, "actors.count=2")
    assert (result.exit_code, "actors.count: 1 -> 2" in result.stdout) == (0, True)
    assert len(used_configs(finished)) == 2


@pytest.mark.parametrize("moved", ["folder", "run"])
def test_checkpoints_elsewhere_are_found_from_every_folder_and_under_every_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: str
) -> None:
    monkeypatch.chdir(tmp_path)
    place = "kept" if moved == "folder" else f"{tmp_path}/kept"
    recipe = Path(__file__).parents[3] / RECIPE
    folder = create_run_folder(read_recipe(recipe, ["runs_folder=runs", f"learner.checkpoint_dir={place}"]), "mine")
    write_metrics(folder)
    finish_stages(folder)
    if moved == "folder":
        monkeypatch.chdir(folder)
    else:
        folder = folder.rename(folder.with_name("renamed"))
    result = resume(folder, "--no-evaluate")
    assert (result.exit_code, "is finished" in result.stdout) == (0, True)
    assert len(list((tmp_path / "kept").glob("mine-*/*/step-*"))) == 3
    settings = read_recipe(recipe, [f"runs_folder={tmp_path}/others", f"learner.checkpoint_dir={tmp_path}/kept"])
    other = stage_checkpoints(settings, create_run_folder(settings, "mine"))["pretrain"].location(1)
    assert not Path(other).parents[1].exists(), "a run of the same name below another folder has its own"


def test_a_stage_whose_checkpoints_are_out_of_sight_is_not_begun_again(finished: Path) -> None:
    note_durable(finished, progress_at(30, stage="sequencematch"))
    (finished / "checkpoints" / "sequencematch").rename(finished / "hidden")
    result = resume(finished)
    assert result.exit_code == 2
    assert "stage sequencematch has written checkpoints up to step 30, and none is found" in result.stderr
    (finished / "hidden").rename(finished / "checkpoints" / "sequencematch")
    assert resume(finished, "--no-evaluate").exit_code == 0
