"""A stage goes on from its checkpoint, with more steps or not at all; one that diverges ends with an error that names
why, and with the weights of its last good step.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from buffer.settings import ArithmeticTaskSettings, NoiseSettings
from learner.checkpoints.checkpoint import read_training_state
from learner.checkpoints.store import PROGRESS_FILE, read_progress
from learner.messages import LearnerSpec, StageResult
from learner.settings.model import ScratchModelSettings
from learner.settings.stages import LearnerSettings, StageSettings
from learner.worker import LearnerWorker
from tests.checkpoints import checkpoints_of

TASK = ArithmeticTaskSettings(max_digits=1, train_questions=40, held_out_questions=4)
MODEL = ScratchModelSettings(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=32, max_positions=40)


def worker_in(folder: Path) -> LearnerWorker:
    noise = NoiseSettings(kind="none", rate=0.0)
    worker = LearnerWorker(LearnerSpec(MODEL, TASK, noise, LearnerSettings(), str(folder), seed=3, trackers=()))
    worker.prepare()
    return worker


def stage_of(objective: dict[str, object], **optimizer: object) -> StageSettings:
    return StageSettings.model_validate(
        {"name": "only", "objective": objective, "steps": 5, "batch_size": 4, "optimizer": optimizer}
    )


def test_a_gradient_that_is_not_finite(tmp_path):
    worker = worker_in(tmp_path)
    stage = stage_of({"name": "mle"}, learning_rate=1e30, warmup_steps=0, schedule="constant")
    with pytest.raises(FloatingPointError, match=r"^step 1: loss \S+, gradient norm nan; .* inside the model$"):
        worker.run_stage(stage)
    (checkpoint,) = checkpoints_of(tmp_path / "checkpoints" / "only")
    assert read_progress(checkpoint).step == 1
    assert read_training_state(checkpoint)["step"] == 1
    assert read_progress(checkpoint).expert_stream["rows"] == 4  # of the step that was good
    rows = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1]


@pytest.mark.parametrize("steps", [1, 5])
def test_weights_that_are_not_finite_are_no_last_good_checkpoint(tmp_path, steps):
    """The loss before the step was; it would be found by the next step alone, and after the last one by nobody."""
    worker = worker_in(tmp_path)
    stage = stage_of({"name": "mle"}, learning_rate=1e39, warmup_steps=0, schedule="constant")
    with pytest.raises(FloatingPointError, match=r"^step 1: .* not finite .* Lower stages\.only\.optimizer\.learning"):
        worker.run_stage(stage.model_copy(update={"steps": steps}))
    assert checkpoints_of(tmp_path / "checkpoints" / "only") == []


def test_leaving_the_domain_of_a_divergence(tmp_path):
    """Large logits at the start, and an alpha that no divergence with a domain stands."""
    worker = worker_in(tmp_path)
    objective = {"name": "sequencematch", "divergence": "hellinger", "alpha": 3.0, "domain_policy": "stop"}
    with pytest.raises(ArithmeticError, match=r"^step 0: \S+ % of alpha r .* divergence hellinger .* Lower alpha"):
        worker.run_stage(stage_of(objective))
    (checkpoint,) = checkpoints_of(tmp_path / "checkpoints" / "only")
    assert read_progress(checkpoint).step == 0
    assert not read_training_state(checkpoint)["optimizer"]["state"]  # no step was taken


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
