"""Priorities of rollouts: against a plain loop over actions, and from a step of the trainer as they were drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from learner.batches import build_micro_batches, count_batch, priorities_of_sample
from learner.objectives import make_objective
from learner.objectives.base import EvaluatedTrajectories
from learner.ranks import Ranks
from learner.settings.stages import StageSettings
from learner.state_tree.policy import TreePolicy
from learner.trainer import Trainer
from tests.random_trajectories import CLONING, MATCHING, TREES, random_trajectories
from tests.tiny_models import tiny_model
from tests.trajectories import BACKSPACE, batch_of, row

NUM_ROLLOUTS = 12


def stage_of(objective):
    return StageSettings.model_validate(
        {"name": "s", "objective": objective, "steps": 4, "batch_size": 6, "rollout_batch_size": NUM_ROLLOUTS}
        | {"optimizer": {"learning_rate": 0.01, "warmup_steps": 1}}
    )


def residual_means(model, batch, gamma):
    """Mean over each log's actions of |Q(s, a) - gamma V(s')|, one log at a time."""
    means = []
    for index in range(batch.num_rows):
        (tree,) = build_micro_batches(batch.slice(index, 1), replace(TREES, max_tokens_per_micro_batch=10_000))
        values = TreePolicy(model, BACKSPACE).evaluate(tree)
        residuals = [
            abs(float(q) - gamma * float(v)) for q, v in zip(values.q.detach(), values.v_next.detach(), strict=True)
        ]
        means.append(sum(residuals) / len(residuals) if residuals else 0.0)
    return means


@torch.no_grad()
def test_the_objective_averages_residuals_over_each_log():
    objective = make_objective(stage_of(MATCHING).objective)
    batch = batch_of([row("a", [5, 6, BACKSPACE, 7]), row("empty", []), row("b", [9]), row("c", [5, 6])])
    (tree,) = build_micro_batches(batch, replace(TREES, max_tokens_per_micro_batch=10_000))
    model = tiny_model()
    for each, rows in ((tree, batch), (tree.without_trajectories(), batch.slice(0, 0))):
        logs = EvaluatedTrajectories(each, TreePolicy(model, BACKSPACE).evaluate(each), count_batch(batch))
        expected = residual_means(model, rows, objective.settings.gamma)
        np.testing.assert_allclose(objective.priorities(logs).numpy(), expected, rtol=1e-5)


class GivenTrajectories:
    """A batch source that gives the same draw each time."""

    def __init__(self, batch):
        self._batch = batch

    def sample(self, count):
        assert count == self._batch.num_rows
        return self._batch


def test_a_step_reports_the_priorities_of_its_draw_before_the_weights_moved():
    """In the order of the draw, though logs are regrouped into several passes."""
    stage, policy = stage_of(MATCHING), TreePolicy(tiny_model(), BACKSPACE)
    rollouts = random_trajectories("policy", NUM_ROLLOUTS, seed=4)
    passes = build_micro_batches(rollouts, TREES)
    evaluated_order = [name for tree in passes for name in tree.trajectories.ids]
    assert len(passes) > 1
    assert evaluated_order != rollouts.column("id").to_pylist()
    experts = GivenTrajectories(random_trajectories("expert", 6, seed=3))
    objective, reported = make_objective(stage.objective), []
    sources = experts, GivenTrajectories(rollouts)
    trainer = Trainer(policy, objective, stage, TREES, *sources, report_priorities=reported.append)
    for _ in range(2):
        expected = residual_means(policy.model, rollouts, objective.settings.gamma)
        trainer.train_step()
        np.testing.assert_allclose(reported[-1], expected, rtol=1e-4)
    assert reported[0].dtype == np.float32
    assert not np.array_equal(*reported), "the weights moved"


def test_a_trajectory_that_was_drawn_from_two_shards_has_its_priority_twice():
    drawn = batch_of([row("a", [5]), row("b", [6]), row("a", [5])])
    passes = [(("b",), torch.tensor([2.0])), (("a", "a"), torch.tensor([3.0, 3.0]))]
    assert priorities_of_sample(drawn, passes, Ranks()).tolist() == [3.0, 2.0, 3.0]


def test_an_objective_without_rollouts_has_no_priorities():
    batch = random_trajectories("expert", 2, seed=1)
    tree = build_micro_batches(batch, TREES)[0]
    logs = EvaluatedTrajectories(tree, TreePolicy(tiny_model(), BACKSPACE).evaluate(tree), count_batch(batch))
    with pytest.raises(ValueError, match="behavior_cloning takes no prioritized samples"):
        make_objective(stage_of(CLONING).objective).priorities(logs)
