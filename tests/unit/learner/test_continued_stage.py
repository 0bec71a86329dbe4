"""A stage that goes on from its checkpoint: with more steps, with another optimizer, or not at all."""

from __future__ import annotations

from pathlib import Path

from learner.checkpoints.store import PROGRESS_FILE, read_progress
from learner.messages import StageResult
from tests.checkpoints import checkpoints_of
from tests.unit.learner.test_diverging_stage import stage_of, worker_in


def learn(folder: Path, steps: int, *, stopped: bool = False, **optimizer: object) -> tuple[StageResult, list[str]]:
    """One life of a learner; gives how the stage ended, and what people were told."""
    worker = worker_in(folder)
    if stopped:
        worker.request_stop()
    stage = stage_of({"name": "mle"}, warmup_steps=0, **optimizer).model_copy(update={"steps": steps})
    result = worker.run_stage(stage)
    assert result is not None
    return result, list(worker.status().notes)


def test_a_finished_stage_goes_on_where_it_is_given_more_steps(tmp_path):
    learn(tmp_path, 3)
    assert learn(tmp_path, 3)[1] == []
    result, (note,) = learn(tmp_path, 5)
    assert (result.step, result.finished) == (5, True)
    assert "stage only goes on after step 3 with learning rate" in note
    newest = checkpoints_of(tmp_path / "checkpoints" / "only")[-1]
    assert (read_progress(newest).step, read_progress(newest).stage_steps) == (5, 5)


def test_another_learning_rate_is_told(tmp_path):
    learn(tmp_path, 4, schedule="constant", learning_rate=1e-2)
    _, (note,) = learn(tmp_path, 6, schedule="constant", learning_rate=1e-3)
    assert note.startswith("stage only goes on after step 4 with learning rate 0.001 instead of 0.01,")


def test_a_stop_before_a_step_leaves_the_checkpoint_as_it_is(tmp_path):
    """It was written again, without the means of the metrics, by which the best one is kept."""
    learn(tmp_path, 3)
    (checkpoint,) = checkpoints_of(tmp_path / "checkpoints" / "only")
    written = (checkpoint / PROGRESS_FILE).stat()
    result, _ = learn(tmp_path, 6, stopped=True)
    assert (result.step, result.finished) == (3, False)
    (checkpoint,) = checkpoints_of(tmp_path / "checkpoints" / "only")
    assert read_progress(checkpoint).metrics["loss"] > 0.0
    assert (checkpoint / PROGRESS_FILE).stat().st_ino == written.st_ino
