"""dpg, gdc, gdc_pp and f_dpg: golden numbers, exact expectations over all rollouts of a tiny transformer, the fit of
lambda, and what happens where a constraint cannot be met."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from buffer.experts.tasks import Task
from learner.metrics.alarms import MetricAlarms
from learner.objectives import make_objective
from learner.objectives.score_function import Rollouts, Weighed
from learner.objectives.target_estimates import PartitionFunction, fit_moments
from learner.objectives.target_rules import Densities, TargetAscent, advantages
from learner.ranks import Ranks
from learner.settings.objectives import FDivergence
from learner.settings.stages import AlarmSettings
from learner.state_tree.policy import TreePolicy
from learner.trainer import Trainer
from tests.objectives import objective_of
from tests.training import check_resume, make_model, make_stage, make_trees
from tests.unit.learner import test_score_functions
from tests.unit.learner.test_score_functions import NoExperts, ScoredRollouts, World, expected_direction, table

world = test_score_functions.world

BASE = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
PHI = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
TARGET = torch.tensor([0.4, 0.3, 0.2, 0.9], dtype=torch.float64)  # at lambda = ln 9
Z = 1.8
ONE_PROMPT = torch.zeros(4, dtype=torch.int64)
DIVERGENCES = get_args(FDivergence)
ADVANTAGES = ("dpg", "gdc_pp")


def target_of(name: str, *constraints: dict[str, object], features=("phi",), fit_samples=1, **settings) -> TargetAscent:
    """gdc_pp with the newest policy as its proposal, unless the settings say otherwise."""
    if name == "gdc_pp":
        settings = {"proposal": "latest"} | settings
    given = constraints or ({"feature": "phi"},)
    made = objective_of(name, features=features, constraints=given, fit_samples=fit_samples, **settings)
    assert isinstance(made, TargetAscent)
    return made


HALF = {"feature": "phi", "target": 0.5}


def advantages_of(name: str, given: Densities, **settings) -> Tensor:
    return advantages(target_of(name, HALF, **settings).settings, given)


def densities(pi: Tensor, mu: Tensor) -> Densities:
    return Densities(TARGET.log(), pi.log(), mu.log(), torch.full_like(pi, Z), torch.full_like(pi, Z))


def logit_gradient(coefficients: Tensor, pi: Tensor, mu: Tensor) -> Tensor:
    """E_mu[c grad log pi] by the logits of a table: grad log pi(x) = e_x - pi."""
    return mu * coefficients - pi * (mu * coefficients).sum()


def test_golden_lambda():
    """The closed form for one binary feature, by every sample of the table at once, and the target that it gives."""
    fitted = fit_moments(PHI[:, None], BASE.log(), ONE_PROMPT, torch.tensor([0.5], dtype=torch.float64), ["phi"])
    assert fitted.item() == pytest.approx(math.log(9), abs=1e-5)
    p = TARGET / TARGET.sum()
    assert float(TARGET.sum()) == pytest.approx(Z)
    assert p.tolist() == pytest.approx([2 / 9, 1 / 6, 1 / 9, 1 / 2])
    assert float((p * (p / BASE).log()).sum()) == pytest.approx(0.510826, abs=1e-6)


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("mu", [BASE, torch.full((4,), 0.25, dtype=torch.float64)], ids=["on policy", "stale"])
def test_golden_gradient(name, mu):
    """All four forms are the same direction."""
    found = logit_gradient(advantages_of(name, densities(BASE, mu)), BASE, mu)
    assert found.tolist() == pytest.approx([-0.32, -0.24, -0.16, 0.72])


@pytest.mark.parametrize(("name", "expected"), [("dpg", 8.796), ("gdc_pp", 5.376)])
def test_golden_variance(name, expected):
    coefficients = advantages_of(name, densities(BASE, BASE))
    squares = (torch.eye(4, dtype=torch.float64) - BASE).square().sum(1)
    mean = logit_gradient(coefficients, BASE, BASE)
    assert float((BASE * coefficients.square() * squares).sum() - mean.square().sum()) == pytest.approx(expected)


@pytest.mark.parametrize("mu", [TARGET / Z, BASE], ids=["on policy", "stale"])
def test_at_the_target_the_baseline_leaves_nothing(mu):
    given = densities(TARGET / Z, mu)
    assert advantages_of("gdc_pp", given).abs().max() < 1e-12
    assert advantages_of("dpg", given).abs().max() > 1
    for divergence in DIVERGENCES:
        assert advantages_of("f_dpg", given, divergence=divergence).abs().max() < 1e-12


def f_divergence(name: str, p: Tensor, pi: Tensor) -> Tensor:
    """E_p[f(pi / p)], by its definition."""
    middle = (p + pi) / 2
    terms = {
        "kl": p * (p / pi).log(),
        "reverse_kl": pi * (pi / p).log(),
        "tv": (p - pi).abs() / 2,
        "js": p * (p / middle).log() + pi * (pi / middle).log(),
        "chi2": (p - pi).square() / pi,
        "reverse_chi2": (p - pi).square() / p,
    }
    return terms[name].sum()


class KnownZ(TargetAscent):
    """Weighs by its advantage, with the true Z and lambda."""

    log_target: Tensor

    def weigh(self, rollouts):
        log_target = self.log_target[rollouts.key]
        z = self.log_target.exp().sum().expand(len(rollouts))
        found = advantages(self.settings, Densities(log_target, rollouts.log_pi, rollouts.log_mu, z, z))
        return Weighed(found, {})


@pytest.mark.parametrize("stale", [False, True], ids=["on policy", "stale"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_f_dpg_descends_its_divergence(world: World, divergence, stale):
    rollouts = world.rollouts if stale else replace(world.rollouts, log_mu=world.rollouts.log_pi)
    log_target = rollouts.log_base + rollouts.features @ torch.tensor([0.8, -0.4], dtype=torch.float64)
    rule = KnownZ(target_of("f_dpg", HALF, divergence=divergence).settings, features=("phi",))
    rule.log_target = log_target
    found = world.gradient(expected_direction(world, rule, rollouts))
    loss = f_divergence(divergence, log_target.softmax(0), world.log_pi.exp())
    torch.testing.assert_close(found, world.gradient(-loss), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("stale", [False, True], ids=["on policy", "stale"])
@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("pointwise", [False, True])
def test_gdc_descends_kl_whatever_z_it_believes(world: World, name, pointwise, stale):
    """Z times the gradient of KL(p, pi), with Z estimated from the other rollout of each pair and a wrong past."""
    rollouts = world.rollouts if stale else replace(world.rollouts, log_mu=world.rollouts.log_pi)
    weight = torch.tensor([0.9], dtype=torch.float64)
    constraints = [{"feature": "b"}, {"feature": "n", "target": 1.0}]
    rule = target_of(name, *(constraints if pointwise else constraints[1:]), features=("b", "n"))
    z = PartitionFunction()
    z.add(rollouts.context[:3], torch.tensor([5.0, 0.0, 2.0], dtype=torch.float64))
    nothing = torch.zeros(1, dtype=torch.float64)
    rule.load_state({"lambda": weight, "samples": torch.zeros(0, 4), "gain": nothing, **z.state()})
    log_target = rollouts.log_base + 0.9 * rollouts.features[:, 1]
    if pointwise:
        log_target = log_target.masked_fill(rollouts.features[:, 0] == 0, -torch.inf)
    found = world.gradient(expected_direction(world, rule, rollouts))
    expected = world.gradient((log_target.exp() * world.log_pi).sum())
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)


def test_lambda_for_several_moments_of_weighted_samples():
    """Against a fine bisection by hand: moments are met on the samples, whatever policy made them."""
    generator = torch.Generator().manual_seed(0)
    features = torch.stack(
        [torch.rand(500, generator=generator) < 0.1, torch.randn(500, generator=generator)], 1
    ).double()
    log_weight = torch.randn(500, generator=generator, dtype=torch.float64)
    log_weight[::7] = -torch.inf  # what a pointwise constraint rules out
    targets = torch.tensor([0.5, 1.3], dtype=torch.float64)
    fitted = fit_moments(features, log_weight, torch.zeros(500, dtype=torch.int64), targets, ["a", "b"])
    probability = (log_weight + features @ fitted).softmax(0)
    assert (probability @ features).tolist() == pytest.approx(targets.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("features", "targets", "message"),
    [
        (
            [[0.0], [0.0]],
            [0.5],
            r"feature f0 .* between 0 and 0 .* no weight of it gives a mean of 0\.5",
        ),
        ([[0.0], [1.0]], [1.0], r"no weight of it gives a mean of 1: .*leave target out for a pointwise constraint"),
        ([[0.0, 1.0], [1.0, 0.0]], [0.5, 0.2], r"no weights of f0, f1 give the means 0\.5, 0\.2 together"),
        ([], [0.5], r"none of 0 rollouts satisfies the pointwise constraints"),
    ],
)
def test_moments_that_no_weight_gives(features, targets, message):
    given = torch.tensor(features, dtype=torch.float64).reshape(-1, len(targets))
    names = [f"f{index}" for index in range(len(targets))]
    with pytest.raises(ValueError, match=message):
        fit_moments(
            given, torch.zeros(len(given)).double(), ONE_PROMPT[: len(given)], torch.tensor(targets).double(), names
        )


def test_z_of_each_context_leaves_the_rollout_itself_out():
    z = PartitionFunction()
    z.add(torch.tensor([7, 7]), torch.tensor([1.0, 2.0], dtype=torch.float64))
    context, ratio = torch.tensor([7, 9, 9]), torch.tensor([100.0, 4.0, 8.0], dtype=torch.float64)
    found, pooled = z.leave_one_out(context, ratio)
    # Of the pool of all others one rollout counts in each context.
    expected = [(3 + 15 / 4) / 3, (8 + 111 / 4) / 2, (4 + 107 / 4) / 2]
    assert found.tolist() == pytest.approx(expected)
    assert pooled.tolist() == pytest.approx([15 / 4, 111 / 4, 107 / 4])
    z.add(context, ratio)
    assert (z.state()["z_total"].sum() / z.state()["z_count"].sum()).item() == pytest.approx(115 / 5)
    assert torch.cat(PartitionFunction().leave_one_out(context[:1], ratio[:1])).tolist() == [0.0, 0.0]


def pointwise_rules(divergence: str) -> list[TargetAscent]:
    return [target_of("dpg"), target_of("gdc_pp"), target_of("f_dpg", divergence=divergence)]


@pytest.mark.parametrize("divergence", ["kl", "tv", "js", "chi2"])
def test_a_pointwise_constraint_that_nothing_meets_changes_nothing_and_is_said(divergence):
    rollouts = table(BASE, BASE, features=torch.zeros(4, 1, dtype=torch.float64))
    for rule in pointwise_rules(divergence):
        weighed = rule.weigh(rollouts)
        assert weighed.coefficients.tolist() == [0.0] * 4
        assert all(math.isfinite(value) for value in weighed.metrics.values())
        rule.learn(rollouts)
        assert rule.weigh(rollouts).coefficients.tolist() == [0.0] * 4
    alarms, warnings = MetricAlarms(make_stage(CASES["gdc_pp"]), AlarmSettings()).check(3, weighed.metrics)
    assert alarms["alarm_unsatisfied"] == 1
    assert "unsatisfied_fraction 1 is beyond 0.99; few rollouts meet the pointwise constraints" in warnings[0]


@pytest.mark.parametrize("divergence", ["kl", "tv", "js", "chi2"])
def test_one_rollout_that_meets_the_constraint_is_enough(divergence):
    """Finite, and toward it: the others have no density at all."""
    rollouts = table(BASE, BASE, features=PHI[:, None])
    for rule in pointwise_rules(divergence):
        rule.learn(rollouts)
        gradient = logit_gradient(rule.weigh(rollouts).coefficients, BASE, BASE)
        assert gradient.isfinite().all()
        assert gradient[3] > 0
        assert (gradient[:3] <= 0).all()


def test_features_that_a_rule_cannot_use():
    with pytest.raises(ValueError, match=r"rollouts have 0 features, and no phi: set scoring\.features"):
        target_of("dpg").weigh(table(BASE, BASE))
    with pytest.raises(ValueError, match=r"feature phi is 0\.5 in a rollout, and a pointwise constraint is met"):
        target_of("dpg").weigh(table(BASE, BASE, features=PHI[:, None] / 2))


@pytest.mark.parametrize("nearer", [True, False])
def test_the_adaptive_proposal_goes_to_whoever_is_nearer_to_the_target(nearer):
    p = TARGET / Z
    good, bad = (p + BASE) / 2, BASE
    pi, mu = (good, bad) if nearer else (bad, good)
    rollouts = Rollouts(*vars(table(mu, BASE, features=PHI[:, None])).values())
    rule = target_of("gdc", HALF, fit_samples=4)
    assert not rule.should_publish()  # the policy has not moved, and may not be judged yet
    rule.learn(rollouts)
    # Each outcome counts alike in a mean over rollouts: so as mu would draw them.
    drawn = replace(rollouts, log_pi=pi.log(), log_mu=torch.full((4,), 0.25).double().log())
    drawn = replace(drawn, log_mu=mu.log())[
        torch.multinomial(mu, 4000, True, generator=torch.Generator().manual_seed(0))
    ]
    rule.learn(drawn)
    assert rule.should_publish() is nearer
    assert rule.should_publish() is False  # nothing was learned since
    assert target_of("dpg").should_publish()


class RolloutsWithFeatures(ScoredRollouts):
    """Actions, whether the answer is 7, and whether no 4 was typed."""

    def _row(self, serial: int) -> dict[str, object]:
        answer = self.answers[serial % len(self.answers)]
        return super()._row(serial) | {"features": [float(len(answer)), float(answer == "7"), float("4" not in answer)]}


SEVEN = {"feature": "seven"}
HALF_SEVEN = {"feature": "seven", "target": 0.6}
CASES = {
    "dpg": {"name": "dpg", "constraints": [SEVEN]},
    "gdc, hybrid": {"name": "gdc", "constraints": [HALF_SEVEN, {"feature": "no_four"}], "fit_samples": 12},
    "gdc_pp": {"name": "gdc_pp", "constraints": [HALF_SEVEN], "fit_samples": 6},
    "f_dpg": {"name": "f_dpg", "divergence": "js", "constraints": [SEVEN]},
}


def make_target_trainer(task: Task, policy, objective: dict[str, object], next_row: int = 0) -> Trainer:
    stage = make_stage(objective, steps=10, rollout_batch_size=6)
    made = make_objective(
        stage.objective,
        Ranks(),
        lambda: TreePolicy(make_model(task, seed=3), task.backspace_id),
        ("length", "seven", "no_four"),
    )
    rollouts = RolloutsWithFeatures(task, next_row=next_row)
    return Trainer(TreePolicy(policy, task.backspace_id), made, stage, make_trees(task), NoExperts(), rollouts)


@pytest.mark.parametrize("name", CASES)
def test_training_approaches_the_target_and_resumes_bit_for_bit(task, name, tmp_path):
    metrics = check_resume(
        task, lambda model, step: make_target_trainer(task, model, CASES[name], next_row=6 * step), 8, [1, 4], tmp_path
    )
    fitting = [row["fitting"] for row in metrics]
    steps_to_fit = {"gdc, hybrid": 2, "gdc_pp": 1}.get(name, 0)
    assert fitting == [1.0] * steps_to_fit + [0.0] * (8 - steps_to_fit)
    assert all(row["loss"] == 0 for row in metrics[:steps_to_fit])
    gaps = [row["constraint_gap"] for row in metrics[steps_to_fit:]]
    assert min(gaps) < 0.75 * gaps[0]
