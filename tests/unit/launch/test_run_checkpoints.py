"""What a run learns from its checkpoints before anything starts, and what it refuses in one line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch.errors import UserError
from launch.run_folder.checkpoints import final_checkpoint, finished_stages, newest_published, steps_taken
from launch.settings.recipe import read_recipe
from launch.settings.run import RunSettings
from learner.checkpoints.store import PROGRESS_FILE
from tests.checkpoints import CONTRACT, progress_at, write_progress

RECIPE = Path("launch/recipes/arithmetic_cpu.yaml")


def settings_with(*overrides: str) -> RunSettings:
    return read_recipe(RECIPE, overrides)


@pytest.mark.parametrize("place", ["null", "memory://runs", "{tmp_path}/elsewhere"])
def test_stages_are_done_and_versions_known_wherever_checkpoints_are(tmp_path, place):
    place = place.format(tmp_path=tmp_path)
    settings, folder = settings_with(f"learner.checkpoint_dir={place}", "stages.pretrain.steps=3"), tmp_path / "run"
    assert finished_stages(settings, folder) == {}
    assert newest_published(settings, folder, CONTRACT) == -1
    write_progress(settings, folder, progress_at(3, stage="pretrain", stage_steps=3, policy_version=-1))
    write_progress(settings, folder, progress_at(8, stage="sequencematch", stage_steps=20, policy_version=6))
    write_progress(settings, folder, progress_at(9, stage="sequencematch", stage_steps=20, policy_version=7))
    (result,) = finished_stages(settings, folder).values()
    assert (result.stage, result.step, result.finished) == ("pretrain", 3, True)
    assert newest_published(settings, folder, CONTRACT) == 7
    assert final_checkpoint(settings, folder, "sequencematch").name == "step-000009"


def test_a_stage_that_stopped_early_is_done(tmp_path):
    settings = settings_with("stages.pretrain.steps=40")
    write_progress(settings, tmp_path, progress_at(3))
    assert (finished_stages(settings, tmp_path), steps_taken(settings, tmp_path)) == ({}, {"pretrain": 3})
    write_progress(settings, tmp_path, progress_at(5, held_out={"stopped_early": 1.0}))
    result = finished_stages(settings, tmp_path)["pretrain"]
    assert (result.step, result.finished, steps_taken(settings, tmp_path)) == (5, True, {"pretrain": 40})
    assert finished_stages(settings_with("stages.pretrain.steps=41"), tmp_path) == {}, "more steps continue it"


def test_checkpoints_of_other_tokens_are_refused_before_a_run_starts(tmp_path):
    settings = settings_with()
    write_progress(settings, tmp_path, progress_at(3))
    other = replace(CONTRACT, tokenizer_hash="other")
    with pytest.raises(UserError, match=r"pretrain/step-000003 was trained with other tokens .* or start a new run"):
        newest_published(settings, tmp_path, other)


def test_a_damaged_checkpoint_is_refused_before_a_run_starts(tmp_path):
    settings = settings_with()
    write_progress(settings, tmp_path, progress_at(3))
    (tmp_path / "checkpoints/pretrain/step-000003" / PROGRESS_FILE).write_text("{")
    with pytest.raises(UserError, match="step-000003 is not a training checkpoint"):
        finished_stages(settings, tmp_path)


def test_a_place_that_cannot_be_reached_is_refused(tmp_path):
    with pytest.raises(UserError, match="Protocol not known: nowhere"):
        finished_stages(settings_with("learner.checkpoint_dir=nowhere://x"), tmp_path)


def test_they_are_looked_at_without_a_wait_for_torch() -> None:
    """As by commands that train nothing: a comparison that is reported again."""
    program = (
        "import sys, launch.compare.results, launch.run_folder.checkpoints\n"
        "print([name for name in ('torch', 'ray', 'vllm', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")
