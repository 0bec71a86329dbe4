"""What holds for every objective of the registry, whatever it computes."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from learner.objectives.adversarial_js import AdversarialJs
from learner.objectives.base import Metrics, Objective, combine_metrics
from learner.settings.objectives import ObjectiveSettings
from learner.state_tree.batch import TreeBatch
from learner.state_tree.policy import TreePolicy
from tests.objectives import EXPERT_LOGS, OBJECTIVES, ROLLOUT_LOGS, counts_of, objective_of
from tests.unit.learner.test_state_tree import BACKSPACE, build, tiny


@pytest.fixture(scope="module")
def policy() -> TreePolicy:
    return TreePolicy(tiny("gpt2").double(), BACKSPACE)


@pytest.fixture
def objective(request) -> Objective:
    """The case of `OBJECTIVES` that the test is parametrized with."""
    base = TreePolicy(tiny("llama").double(), BACKSPACE)
    return objective_of(request.param.split(",")[0], base, **OBJECTIVES[request.param])


def shares_of(
    objective: Objective, policy: TreePolicy, experts: list[TreeBatch], rollouts: list[TreeBatch]
) -> list[tuple[Tensor, Metrics]]:
    """Losses and metrics of the passes of a step, with the counts of the whole trajectories."""
    data_counts, counts = counts_of(build(EXPERT_LOGS)), counts_of(build(ROLLOUT_LOGS))
    needs, shares = objective.settings, []
    if needs.needs_experts:
        evaluated = [objective.evaluate(policy, tree, data_counts, 0) for tree in experts]
        shares += [objective.data_loss(data, 0) for data in evaluated]
    if needs.needs_rollouts:
        evaluated = [objective.evaluate(policy, tree, counts, 0) for tree in rollouts]
        shares += [objective.rollout_loss(each, data_counts, 0) for each in evaluated]
    return shares


def gradients_of(objective: Objective, policy: TreePolicy, shares: list[tuple[Tensor, Metrics]]) -> list[Tensor]:
    """By what is trained; 0 where nothing depends on it."""
    parameters = list(policy.parameters())
    if isinstance(objective, AdversarialJs):
        parameters += objective._discriminator.parameters()
    loss = torch.stack([loss for loss, _ in shares]).sum()
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


def test_every_objective_of_the_registry_is_here():
    kinds = get_args(get_args(ObjectiveSettings)[0])
    names = {name for kind in kinds for name in get_args(kind.model_fields["name"].annotation)}
    assert {case.split(",")[0] for case in OBJECTIVES} == names - {"custom"}  # which is any class: test_custom.py


@pytest.mark.parametrize("objective", [case for case in OBJECTIVES if case != "scheduled_sampling"], indirect=True)
def test_a_step_is_the_same_however_it_is_cut(objective, policy):
    """One tree, or one for each trajectory: losses, metrics and gradients add up. What scheduled sampling draws depends
    on what is in a tree."""
    results = []
    for parts in (1, 2, 8):
        trees = [
            [build(trajectories[n::parts]) for n in range(min(parts, len(trajectories)))]
            for trajectories in (EXPERT_LOGS, ROLLOUT_LOGS)
        ]
        if objective.settings.needs_rollouts:
            objective.begin_step(policy, trees[1], counts_of(*trees[1]), 0)
        shares = shares_of(objective, policy, *trees)
        metrics = combine_metrics(metrics for _, metrics in shares)
        results.append((metrics, gradients_of(objective, policy, shares)))
    assert any(bool(gradient.any()) for gradient in results[0][1])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@pytest.mark.parametrize("objective", OBJECTIVES, indirect=True)
def test_a_tree_without_trajectories_adds_nothing(objective, policy):
    """As a rank has one whose share is empty, and whose passes the others still wait for: every metric is there."""
    full = [build(EXPERT_LOGS)], [build(ROLLOUT_LOGS)]
    empty = [[tree.without_trajectories() for tree in trees] for trees in full]
    counted = empty[0][0]
    assert (counted.num_trajectories, counted.num_actions, counted.num_nodes, counted.num_nodes_unshared) == (0,) * 4
    if objective.settings.needs_rollouts:
        objective.begin_step(policy, [*full[1], *empty[1]], counts_of(*full[1]), 0)
    shares = shares_of(objective, policy, *empty)
    for (loss, metrics), (_, expected) in zip(shares, shares_of(objective, policy, *full), strict=True):
        assert loss.item() == 0.0
        assert metrics.keys() == expected.keys()
        assert not any(float(value) for value in metrics.values()), metrics
    assert not any(bool(gradient.any()) for gradient in gradients_of(objective, policy, shares))
