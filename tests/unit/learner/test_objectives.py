"""Losses, gradients and metrics against the float64 oracle, on trajectories that reach every branch."""

from __future__ import annotations

import math

import pytest
import torch

from learner.objectives import make_objective
from learner.objectives.base import EvaluatedTrajectories, combine_metrics
from learner.objectives.sequencematch import DIVERGENCES
from learner.settings.objectives import (
    LikelihoodSettings,
    SequenceMatchSettings,
)
from learner.state_tree.policy import TreePolicy
from tests import oracle
from tests.objectives import counts_of
from tests.oracle import Log, walk
from tests.unit.learner.test_state_tree import BACKSPACE, EOS, HARD, build, tiny

ALPHA, GAMMA = 0.3, 0.9
DATA = HARD
MODEL = [
    Log([1, 4], [8, BACKSPACE, 5, 6, EOS], source="policy"),
    Log([1, 4], [8, BACKSPACE, 8, BACKSPACE], finish_reason="max_actions", source="policy"),
    Log([9], [EOS], source="policy"),
]


@pytest.fixture(scope="module")
def model():
    """GPT-2, since Llama's norm computes in float32 whatever the type of the model."""
    return tiny("gpt2").double()


@pytest.fixture(scope="module")
def walks(model):
    """Every trajectory run alone, by its `id()`; gradients through them need `retain_graph`."""
    return {id(trajectory): walk(model, trajectory, BACKSPACE) for trajectory in [*DATA, *MODEL]}


def evaluate(model, trajectories, counts=None) -> EvaluatedTrajectories:
    tree = build(trajectories)
    return EvaluatedTrajectories(tree, TreePolicy(model, BACKSPACE).evaluate(tree), counts or counts_of(tree))


def total_loss(objective, data, rollouts, step):
    """The sum that the trainer takes over micro-batches, for one of each kind."""
    loss, metrics = objective.data_loss(data, step)
    if rollouts is None:
        return loss, metrics
    rollout_loss, rollout_metrics = objective.rollout_loss(rollouts, data.counts, step)
    return loss + rollout_loss, combine_metrics([metrics, rollout_metrics])


def gradients(loss, model, retain_graph=False):
    return torch.autograd.grad(loss, list(model.parameters()), retain_graph=retain_graph)


def settings(**changes) -> SequenceMatchSettings:
    return SequenceMatchSettings(
        **({"alpha": ALPHA, "gamma": GAMMA, "bc_weight_start": 0.0, "bc_weight_end": 0.0} | changes)
    )


@pytest.mark.parametrize("name", ["mle", "behavior_cloning"])
def test_likelihood(model, name):
    objective = make_objective(LikelihoodSettings(name=name))
    assert (objective.settings.name, objective.settings.needs_rollouts) == (name, False)
    loss, metrics = total_loss(objective, evaluate(model, DATA), None, step=0)
    expected = oracle.cross_entropy([walk(model, trajectory, BACKSPACE) for trajectory in DATA])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, model), gradients(expected, model))
    assert float(metrics["loss_behavior_cloning"]) == pytest.approx(expected.item())
    with pytest.raises(ValueError, match="takes no rollouts"):
        total_loss(objective, evaluate(model, DATA), evaluate(model, MODEL), step=0)


def estimators(divergence: str) -> list[str]:
    return ["collapsed", "paper"] + (["uniform"] if divergence != "mle" else [])


CASES = [
    (divergence, estimator, scale)
    for divergence in DIVERGENCES
    for estimator in estimators(divergence)
    for scale in ((1.0, 0.37, "paper") if divergence == "chi2_mixture" else (1.0,))
]
SUBSETS = {
    "all": DATA,
    "eos": [trajectory for trajectory in DATA if trajectory.finish_reason == "eos"],
    "truncated": [trajectory for trajectory in DATA if trajectory.finish_reason != "eos"],
    **{f"trajectory {i}": [trajectory] for i, trajectory in enumerate(DATA) if trajectory.actions},
}


def is_quick(subset: str, scale: float | str) -> bool:
    """Single trajectories are worth their time with the default scale."""
    return not subset.startswith("log") or scale == 1.0


@pytest.mark.parametrize(
    ("divergence", "estimator", "scale", "subset"),
    [(*case, subset) for case in CASES for subset in SUBSETS if is_quick(subset, case[2])],
)
def test_sequencematch_against_the_oracle(model, walks, divergence, estimator, scale, subset):
    """All trajectories together, by how they end, and each data trajectory alone, so that no branch hides behind
    another."""
    data_trajectories = SUBSETS[subset]
    objective = make_objective(settings(divergence=divergence, estimator=estimator, mixture_scale=scale))
    coefficient = 1.0 if scale == "paper" else scale / (4 * ALPHA)
    data = evaluate(model, data_trajectories)
    rollouts = evaluate(model, MODEL) if objective.settings.needs_rollouts else None
    loss, _ = total_loss(objective, data, rollouts, step=0)
    expected = oracle.sequencematch_loss(
        oracle.Terms(divergence, ALPHA, GAMMA, SequenceMatchSettings().domain_margin, uniform=estimator == "uniform"),
        [walks[id(trajectory)] for trajectory in data_trajectories],
        [walks[id(trajectory)] for trajectory in MODEL],
        rollout_penalty=coefficient if divergence == "chi2_mixture" else 0.0,
        shared_start=estimator == "collapsed",
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, model), gradients(expected, model, retain_graph=True))


@pytest.mark.parametrize("divergence", list(DIVERGENCES))
def test_paper_equals_collapsed_with_a_shared_start(model, divergence):
    shared = [trajectory for trajectory in HARD if trajectory.prompt == [1, 4]]
    rollouts = [trajectory for trajectory in MODEL if trajectory.prompt == [1, 4]]
    assert {trajectory.finish_reason for trajectory in shared} == {"eos", "max_actions"}
    data, sampled = evaluate(model, shared), evaluate(model, rollouts)
    losses = {}
    for estimator in ("paper", "collapsed"):
        objective = make_objective(settings(divergence=divergence, estimator=estimator))
        given = sampled if objective.settings.needs_rollouts else None
        losses[estimator], _ = total_loss(objective, data, given, step=0)
    torch.testing.assert_close(losses["paper"], losses["collapsed"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(losses["paper"], list(model.parameters()), retain_graph=True),
        gradients(losses["collapsed"], model),
        rtol=1e-9,
        atol=1e-12,
    )


def test_beta_is_annealed_linearly(model):
    changes = {"bc_weight_start": 0.8, "bc_weight_end": 0.2, "bc_weight_steps": 10}
    objective = make_objective(settings(**changes))
    data, sampled = evaluate(model, DATA), evaluate(model, MODEL)
    for step, beta in ((0, 0.8), (5, 0.5), (10, 0.2), (1000, 0.2)):
        loss, metrics = total_loss(objective, data, sampled, step)
        assert float(metrics["beta"]) == pytest.approx(beta)
        mixed = beta * metrics["loss_behavior_cloning"] + (1 - beta) * metrics["loss_sequencematch"]
        torch.testing.assert_close(loss.detach(), mixed)


def test_metrics_say_what_they_are_named(model):
    alpha = 0.5  # small enough a bound that some residuals lie beyond it
    _, metrics = total_loss(
        make_objective(settings(alpha=alpha)), evaluate(model, DATA), evaluate(model, MODEL), step=0
    )
    walks = [walk(model, trajectory, BACKSPACE) for trajectory in DATA]
    residuals = torch.stack([q - GAMMA * w.v[t + 1] for w in walks for t, q in enumerate(w.q)])
    log_probs = torch.stack([q - w.v[t] for w in walks for t, q in enumerate(w.q)])
    ended = [w.v[-1] for w in walks if not w.truncated]
    beyond = (residuals.abs() > 2 / alpha).double().mean()
    assert 0 < beyond < 1
    expected = {
        "r_mean": residuals.mean(),
        "r_max_abs": residuals.abs().max(),
        "r_fraction_beyond_bound": beyond,
        "log_prob_mean": log_probs.mean(),
        "value_mean": torch.stack([v for w in walks for v in w.v[:-1]]).mean(),
        "value_eos_mean": torch.stack(ended).mean(),
        "truncated_fraction": torch.tensor(3 / 8),
        "truncated_fraction_model": torch.tensor(1 / 3),
    }
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value.item(), rel=1e-6), name
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())


def test_a_batch_of_empty_logs_has_a_finite_loss(model):
    empty = [Log([9], [], finish_reason="aborted", source="policy")]
    loss, metrics = total_loss(make_objective(settings()), evaluate(model, empty), evaluate(model, empty), step=0)
    assert math.isfinite(float(loss.detach()))
    assert all(math.isfinite(float(value)) for value in metrics.values())
