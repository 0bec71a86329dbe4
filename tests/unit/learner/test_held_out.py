"""Evaluation during training: what the loss is, that it changes nothing, when it is measured, what ends a stage."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from buffer.experts.stream import clean_trajectories
from buffer.settings import ArithmeticTaskSettings, NoiseSettings
from learner.checkpoints.store import read_progress
from learner.held_out import HeldOutLoss, StageEvaluation
from learner.messages import LearnerSpec, StageResult
from learner.ranks import Ranks
from learner.settings.held_out import HeldOutSettings
from learner.settings.model import ScratchModelSettings
from learner.settings.stages import LearnerSettings, StageSettings
from learner.state_tree.policy import TreePolicy
from learner.worker import LearnerWorker
from tests.checkpoints import checkpoints_of
from tests.training import (
    CLONING,
    MATCHING,
    assert_bit_identical,
    make_model,
    make_stage,
    make_trainer,
    make_trees,
    train,
    weights_of,
)

EVERY_2 = HeldOutSettings(every_steps=2)


def loss_on(task) -> HeldOutLoss:
    return HeldOutLoss(clean_trajectories(task.held_out, task.contract()), make_trees(task), Ranks())


def test_the_loss_is_the_mean_over_tokens_of_what_the_policy_gives_the_targets(task):
    """Against a loop over examples in float64; backspace has no probability at the floor, elsewhere it has."""
    model = make_model(task).requires_grad_(False)
    log_probs = []
    for row in task.held_out:
        prompt, target = list(row["prompt_ids"]), list(row["target_ids"])
        logits = model(torch.tensor([prompt + target])).logits[0].double()
        logits[len(prompt) - 1, task.backspace_id] = -math.inf
        log_probs += [float(logits[len(prompt) - 1 + i].log_softmax(-1)[token]) for i, token in enumerate(target)]
    expected = -sum(log_probs) / len(log_probs)
    assert loss_on(task).measure(TreePolicy(model, task.backspace_id)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("objective", [CLONING, MATCHING], ids=lambda o: str(o["name"]))
def test_weights_and_random_numbers_are_the_same_with_and_without_evaluation(task, objective):
    found = {}
    for evaluated in (False, True):
        torch.manual_seed(1)
        model = make_model(task, seed=3)
        trainer, policy = make_trainer(task, model, make_stage(objective)), TreePolicy(model, task.backspace_id)
        evaluation = StageEvaluation(HeldOutSettings(every_steps=1), loss_on(task))
        for step in range(1, 7):
            train(trainer, 1)
            if evaluated:
                assert evaluation.after_step(policy, step, last_step=6)["held_out_loss"] > 0.0
        assert all(parameter.grad is None or parameter.requires_grad for parameter in model.parameters())
        found[evaluated] = weights_of(model), torch.get_rng_state()
    assert_bit_identical(found[True][0], found[False][0])
    assert torch.equal(found[True][1], found[False][1])


class GivenLoss:
    """Losses in their order, in place of a model's."""

    def __init__(self, *losses: float) -> None:
        self._losses = list(losses)

    def measure(self, policy: object) -> float:
        return self._losses.pop(0)


def evaluation_of(settings: HeldOutSettings, *losses: float) -> StageEvaluation:
    return StageEvaluation(settings, GivenLoss(*losses))  # type: ignore[arg-type]


def steps_until_stop(evaluation: StageEvaluation, last_step: int, first_step: int = 1) -> int:
    for step in range(first_step, last_step + 1):
        evaluation.after_step(None, step, last_step)  # type: ignore[arg-type]
        if evaluation.stops_early:
            return step
    return last_step


def test_every_nth_step_and_the_last_one_are_evaluated():
    evaluation = evaluation_of(EVERY_2, 3.0, 2.0, 1.0)
    found = {step: evaluation.after_step(None, step, last_step=5) for step in range(1, 6)}
    assert found == {1: {}, 2: {"held_out_loss": 3.0}, 3: {}, 4: {"held_out_loss": 2.0}, 5: {"held_out_loss": 1.0}}
    assert StageEvaluation(HeldOutSettings(), None).after_step(None, 5, last_step=5) == {}


def test_actors_are_asked_with_the_first_weights_since_an_evaluated_step():
    def asked(every: int, publish_every: int) -> list[int]:
        evaluation = evaluation_of(HeldOutSettings(every_steps=every))
        found = []
        for step in range(publish_every, 61, publish_every):
            evaluation.published(step, 100 + step, publish_every)
            found += [step] if evaluation.questions_version == 100 + step else []
        return found

    assert asked(20, 10) == [20, 40, 60]
    assert asked(10, 20) == [20, 40, 60]
    assert asked(25, 10) == [30, 50]


@pytest.mark.parametrize(
    ("patience", "losses", "stopped_after"),
    [
        (2, (3.0, 2.0, 2.5, 1.0, 1.5, 1.5, 0.5), 12),
        (2, (3.0, 2.0, 2.0, 2.0, 0.0), 8),  # an equal value is no improvement
        (3, (3.0, 3.5, 3.1, 2.9, 2.9), 10),
        (4, (1.0, 2.0, 3.0, 4.0, 5.0), 10),  # in the last step
        (None, (1.0, 2.0, 3.0, 4.0, 5.0), 10),
    ],
)
def test_a_stage_stops_after_patience_evaluations_without_improvement(patience, losses, stopped_after):
    evaluation = evaluation_of(HeldOutSettings(every_steps=2, patience=patience), *losses)
    last_step = 2 * len(losses)
    assert steps_until_stop(evaluation, last_step) == stopped_after
    told = evaluation.early_stop("s", stopped_after)
    assert (told is None) == (stopped_after == last_step)
    if told is not None:
        assert f"stage s stopped early after step {stopped_after}: held_out_loss" in told


def test_accuracy_is_better_when_it_is_higher_and_counts_for_its_own_stage_alone():
    settings = HeldOutSettings(every_steps=100, patience=1, stop_metric="held_out_accuracy")
    evaluation = evaluation_of(settings)
    evaluation.report_answers(2, {"held_out_accuracy": 0.9})
    assert evaluation.after_step(None, 9, last_step=99) == {}, "version 2 was published by another stage"
    for step, accuracy, stops in ((10, 0.3, False), (20, 0.4, False), (30, 0.35, True)):
        evaluation.published(step, 100 + step, publish_every_steps=10)
        evaluation.report_answers(100 + step, {"held_out_accuracy": accuracy})
        found = evaluation.after_step(None, step + 3, last_step=99)
        assert found == {"held_out_accuracy": accuracy, "held_out_answers_step": step}
        assert evaluation.stops_early is stops
    assert "held_out_accuracy has not become better than 0.4 (step 20) in 1 eval" in evaluation.early_stop("s", 33)


def learn(folder: Path, steps: int = 20) -> tuple[StageResult, LearnerWorker]:
    """A life of a learner whose weights do not move, so that no evaluation is better than the first."""
    task = ArithmeticTaskSettings(max_digits=1, train_questions=40, held_out_questions=4)
    model = ScratchModelSettings(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=32, max_positions=40)
    learner = LearnerSettings(checkpoint_every_steps=1, keep_checkpoints=20, checkpoint_best_metric="held_out_loss")
    noise, held_out = NoiseSettings(kind="none", rate=0.0), HeldOutSettings(every_steps=2, patience=2)
    worker = LearnerWorker(LearnerSpec(model, task, noise, learner, str(folder), 3, trackers=(), held_out=held_out))
    worker.prepare()
    optimizer = {"learning_rate": 1e-30, "warmup_steps": 0, "schedule": "constant"}
    stage = {"name": "only", "objective": {"name": "mle"}, "steps": steps, "batch_size": 4, "optimizer": optimizer}
    result = worker.run_stage(StageSettings.model_validate(stage))
    assert result is not None
    return result, worker


def test_a_stage_that_stops_early_ends_with_its_checkpoint_and_does_so_again_after_a_resume(tmp_path):
    result, worker = learn(tmp_path)
    assert (result.step, result.finished) == (6, True)  # best at 2; not better at 4 and at 6
    assert any("stopped early after step 6" in note for note in worker.status().notes)
    assert worker.status().held_out["held_out_loss_best_step"] == 2
    folders = checkpoints_of(tmp_path / "checkpoints" / "only")
    newest = read_progress(folders[-1])
    assert (newest.step, newest.steps_done, newest.finished) == (6, 20, True)
    assert ["held_out_loss" in read_progress(each).metrics for each in folders] == 3 * [False, True]
    assert not read_progress(folders[-2]).finished
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows if "held_out_loss" in row] == [2, 4, 6]

    for each in folders[4:]:  # as if it had been killed after step 4
        shutil.rmtree(each)
    result, _ = learn(tmp_path)
    assert (result.step, result.finished) == (6, True), "the evaluations before the checkpoint count"

    result, _ = learn(tmp_path, steps=30)
    assert (result.step, result.finished) == (8, True), "more steps continue it, to the next evaluation without a gain"
