"""The training loop on the arithmetic task: it learns, repeats itself bit for bit, and goes on where it stopped."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from learner.batches import build_micro_batches
from learner.checkpoints.checkpoint import load_weights, read_training_state
from learner.checkpoints.store import read_progress
from learner.objectives import make_objective
from learner.objectives.base import (
    EvaluatedTrajectories,
    Metrics,
    Objective,
)
from learner.settings.stages import OptimizerSettings
from learner.state_tree.policy import TreePolicy
from learner.trainer import Trainer, learning_rate_factor
from tests.checkpoints import progress_at, save_checkpoint
from tests.objectives import counts_of, objective_settings
from tests.training import (
    CLONING,
    MATCHING,
    OPTIMIZER,
    HandMadeRollouts,
    assert_bit_identical,
    make_model,
    make_stage,
    make_stream,
    make_trainer,
    make_trees,
    train,
    weights_of,
)


def test_the_loss_falls_on_the_task(task):
    """From a uniform guess over the vocabulary to well below it."""
    stage = make_stage(CLONING, steps=60, batch_size=32)
    metrics = train(make_trainer(task, make_model(task), stage, make_stream(task, noise=0.0)), 60)
    first, last = metrics[0]["loss"], float(np.mean([row["loss"] for row in metrics[-5:]]))
    assert first == pytest.approx(np.log(len(task.tokenizer)), rel=0.05)
    assert last < 0.5 * first


def test_metrics_describe_the_step(task):
    stage = make_stage(MATCHING)
    trainer = make_trainer(task, make_model(task), stage)
    experts, rollouts = make_stream(task).sample(8), HandMadeRollouts(task).sample(5)
    metrics = trainer.train_step()
    trees = [tree for batch in (experts, rollouts) for tree in build_micro_batches(batch, make_trees(task))]
    assert metrics["learning_rate"] == pytest.approx(5e-3 / 3)
    assert metrics["actions_per_s"] * metrics["step_s"] == pytest.approx(sum(tree.num_actions for tree in trees))
    assert metrics["unique_tokens_per_s"] * metrics["step_s"] == pytest.approx(sum(tree.num_nodes for tree in trees))
    unshared = sum(tree.num_nodes_unshared for tree in trees)
    padded = sum(tree.num_padded_nodes for tree in trees)
    assert metrics["padding_fraction"] == pytest.approx(1 - sum(tree.num_nodes for tree in trees) / padded)
    assert metrics["sharing_ratio"] == pytest.approx(unshared / sum(tree.num_nodes for tree in trees))
    assert 0 < metrics["data_wait_s"] < metrics["step_s"]
    assert all(type(value) is float for value in metrics.values())
    assert trainer.train_step()["learning_rate"] == pytest.approx(5e-3 * 2 / 3)


def test_gradients_are_clipped_to_the_norm(task):
    """Seen in the gradients themselves: Adam's first step is the same at every scale."""
    model = make_model(task)
    stage = make_stage(CLONING, optimizer=OPTIMIZER | {"max_grad_norm": 1e-3})
    metrics = make_trainer(task, model, stage).train_step()
    left = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]))
    assert metrics["gradient_norm"] > 0.1  # as it was before
    assert float(left) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("stop_at", [1, 3, 7])
@pytest.mark.parametrize("objective", [CLONING, MATCHING], ids=lambda o: str(o["name"]))
def test_stopping_and_going_on_changes_nothing(task, tmp_path, objective, stop_at):
    """n steps == k steps, a checkpoint on disk, fresh objects, and n - k steps; k in and beyond the warm-up."""
    steps = 9
    stage = make_stage(objective, steps)
    straight = make_model(task, seed=3)
    expected = [row["loss"] for row in train(make_trainer(task, straight, stage), steps)]

    first, stream = make_model(task, seed=3), make_stream(task)
    trainer = make_trainer(task, first, stage, stream)
    losses = [row["loss"] for row in train(trainer, stop_at)]
    progress = progress_at(trainer.step, stage_steps=steps, expert_stream=stream.state())
    path = save_checkpoint(tmp_path, first, task.tokenizer, progress, trainer.state(), keep=1)
    del trainer, first, stream

    torch.manual_seed(999)  # another process starts elsewhere
    second, stream = make_model(task, seed=4), make_stream(task)
    rollouts = HandMadeRollouts(task, next_row=stop_at * stage.rollout_batch_size)
    trainer = make_trainer(task, second, stage, stream, rollouts if objective is MATCHING else None)
    load_weights(second, path)
    trainer.load_state(read_training_state(path))
    stream.load_state(read_progress(path).expert_stream)
    assert trainer.step == stop_at
    assert torch.equal(torch.get_rng_state(), read_training_state(path)["random_state"])
    losses += [row["loss"] for row in train(trainer, steps - stop_at)]
    assert trainer.finished
    assert losses == expected
    assert_bit_identical(weights_of(second), weights_of(straight))


@pytest.mark.parametrize("forgotten", ["optimizer", "step", "stream"])
def test_each_part_of_the_state_matters(task, tmp_path, forgotten):
    """Negative control of the test above: leave a part out, and the end is another one."""
    stage = make_stage(MATCHING, 4)
    straight, cut = make_model(task, seed=3), make_model(task, seed=3)
    train(make_trainer(task, straight, stage), 4)
    stream = make_stream(task)
    trainer = make_trainer(task, cut, stage, stream)
    train(trainer, 2)
    torch.save(trainer.state(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    position = stream.state()
    stream = make_stream(task)
    trainer = make_trainer(task, cut, stage, stream, HandMadeRollouts(task, next_row=10))
    trainer.load_state({**state, **({forgotten: trainer.state()[forgotten]} if forgotten != "stream" else {})})
    if forgotten != "stream":
        stream.load_state(position)
    train(trainer, 2)
    assert any(not torch.equal(a, b) for a, b in zip(cut.parameters(), straight.parameters(), strict=True))


def test_the_optimizer_and_the_steps_of_now_count_after_a_resume(task):
    """From the first step on, though the checkpoint was written under others."""
    model = make_model(task, seed=3)
    stage = make_stage(CLONING, 4, optimizer=OPTIMIZER | {"weight_decay": 0.0})
    trainer = make_trainer(task, model, stage)
    train(trainer, 4)
    state, before = trainer.state(), weights_of(model)
    changed = {"learning_rate": 1e-4, "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.25, "warmup_steps": 0}

    again = make_trainer(task, model, stage)
    assert again.load_state(state) is None
    assert again.finished
    other = make_trainer(task, model, make_stage(CLONING, 11, optimizer=changed))
    note = other.load_state(state)
    assert not other.finished
    expected = 1e-4 * learning_rate_factor(4, OptimizerSettings(**changed), 11)
    assert note == (
        f"stage s goes on after step 4 with learning rate {expected:.4g} instead of 0.00025, since its steps or its "
        "optimizer have changed"
    )
    decayed, spared = other.state()["optimizer"]["param_groups"]
    for group, decay in ((decayed, 0.25), (spared, 0.0)):
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.5, 0.6), 1e-3, decay)
    assert other.train_step()["learning_rate"] == expected
    largest = max(float((tensor - before[name]).abs().max()) for name, tensor in weights_of(model).items())
    assert 0.0 < largest < 1e-3, "the moments of the checkpoint, at a fiftieth of its rate"


def test_the_moments_of_other_parameters_are_refused(task):
    state = make_trainer(task, make_model(task, tie_embeddings=False), make_stage(CLONING)).state()
    with pytest.raises(ValueError, match="not that of the parameters that are trained now"):
        make_trainer(task, make_model(task), make_stage(CLONING)).load_state(state)


def test_a_model_with_dropout_trains_deterministically(task):
    """No sub-network is drawn: the log-probabilities of the data are those of the model that acts."""
    ends = []
    for global_seed in (0, 1):
        model = make_model(task, architecture="gpt2", seed=3)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        for block in model.base_model.h:
            block.attn.attn_dropout.p = 0.5
        assert sum(isinstance(module, torch.nn.Dropout) for module in model.modules()) > 2
        model.train()  # as some callers leave it
        trainer = make_trainer(task, model, make_stage(CLONING))
        torch.manual_seed(global_seed)
        train(trainer, 2)
        ends.append(weights_of(model))
    assert_bit_identical(*ends)
    assert not torch.equal(ends[0]["lm_head.weight"], make_model(task, architecture="gpt2", seed=3).lm_head.weight)


class OverflowingObjective(Objective):
    """A finite loss at first; then the loss, or only its gradient, is beyond all numbers."""

    def __init__(self, broken: str) -> None:
        super().__init__(objective_settings(**CLONING))
        self._broken = broken

    def data_loss(self, data: EvaluatedTrajectories, step: int) -> tuple[Tensor, Metrics]:
        mean = data.values.v.mean()
        if step > 0:
            # The slope of a square root is infinite at 0, its value is not.
            mean = {"loss": mean * torch.inf, "gradient": (mean - mean.detach()).clamp(min=0).sqrt()}[self._broken]
        return mean, {"loss": mean.detach()}


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_leaves_everything_as_it_was(task, broken):
    model = make_model(task)
    objective: Objective = OverflowingObjective(broken)
    policy = TreePolicy(model, task.backspace_id)
    trainer = Trainer(policy, objective, make_stage(CLONING), make_trees(task), make_stream(task), None)
    trainer.train_step()
    before, state = weights_of(model), trainer.state()["learning_rate"]
    moments = [entry["exp_avg"].clone() for entry in trainer.state()["optimizer"]["state"].values()]
    with pytest.raises(FloatingPointError, match=r"^step 1: loss \S+, gradient norm (nan|inf); lower the learning"):
        trainer.train_step()
    assert_bit_identical(weights_of(model), before)
    assert trainer.step == 1
    assert trainer.state()["learning_rate"] == state
    after = [entry["exp_avg"] for entry in trainer.state()["optimizer"]["state"].values()]
    assert all(torch.equal(a, b) for a, b in zip(after, moments, strict=True))


def test_trajectories_without_a_finite_loss_are_named(task):
    """A token whose embedding is not a number spoils every log of its pass; only those that hold it are named."""
    model, rollouts = make_model(task, tie_embeddings=False), HandMadeRollouts(task, answers=("12<3", "7", "45<<6"))
    digit = task.tokenizer.get_vocab()["7"]
    with torch.no_grad():
        model.get_input_embeddings().weight[digit] = torch.nan
    experts = make_stream(task).sample(8)
    drawn = [*experts.to_pylist(), *HandMadeRollouts(task).sample(5).to_pylist()]
    bad = [row["id"] for row in drawn if digit in [*row["prompt_ids"], *row["actions"], *(row.get("executed") or [])]]
    assert 0 < len(bad) < 13
    assert "a/1" in bad
    message = f"Not finite on {len(bad)} of 13 trajectories: {', '.join(bad)}$"
    with pytest.raises(FloatingPointError, match=message):
        make_trainer(task, model, make_stage(MATCHING), rollouts=rollouts).train_step()


def test_rollouts_reach_an_objective_that_needs_them(task):
    """The loss of the step is that of the objective on exactly these experts and these rollouts."""
    stage = make_stage(MATCHING)
    model, rollouts = make_model(task), HandMadeRollouts(task)
    objective, trees = make_objective(stage.objective), make_trees(task)
    evaluated = []
    with torch.no_grad():
        for batch in (make_stream(task).sample(8), HandMadeRollouts(task).sample(5)):
            (tree,) = build_micro_batches(batch, replace(trees, max_tokens_per_micro_batch=10_000))
            evaluated.append(
                EvaluatedTrajectories(tree, TreePolicy(model, task.backspace_id).evaluate(tree), counts_of(tree))
            )
        experts, policy = evaluated
        expected = objective.data_loss(experts, 0)[0] + objective.rollout_loss(policy, experts.counts, 0)[0]
    metrics = make_trainer(task, model, stage, rollouts=rollouts).train_step()
    assert metrics["loss"] == pytest.approx(float(expected))
    assert metrics["penalty_model"] > 0
    assert rollouts.counts == [5]
