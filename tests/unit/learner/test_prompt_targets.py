"""Distributional targets with several prompts: one lambda for all, a target for each, and Z of each.

Golden: two prompts whose rollouts show a feature with rates .1 and .9, and a mean of .7 over both. By the joint law of
prompt and text e^lambda = 7/3, which gives .58; the right lambda is 1.862, which gives .417 and .983.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from learner.objectives import target_estimates
from learner.objectives.score_function import Rollouts
from learner.objectives.target_estimates import PartitionFunction, fit_moments
from learner.objectives.target_rules import Densities, TargetAscent
from tests.unit.learner.test_target_objectives import advantages_of, target_of

RATES = torch.tensor([0.1, 0.9], dtype=torch.float64)
GOAL = torch.tensor([0.7], dtype=torch.float64)
LAMBDA = 1.862
OPTIMUM = torch.sigmoid(torch.logit(RATES) + LAMBDA)
COPIES = 1000
GIVEN = {"feature": "f", "target": 0.7}
METHODS: dict[str, dict[str, object]] = {"dpg": {}, "gdc_pp": {}, "f_dpg": {"divergence": "kl"}}


def rollouts_of(acting: Tensor, policy: Tensor, copies: int = COPIES) -> Rollouts:
    """Of each prompt `copies`, in proportion to what acts, whose rates of the feature are `acting` [C], as `policy`'s
    are [C]: means over them are expectations."""
    context = torch.arange(len(RATES)).repeat_interleave(copies)
    place = torch.arange(copies, dtype=torch.float64).repeat(len(RATES))
    shows = place < (acting[context] * copies).round()

    def log_prob(rates: Tensor) -> Tensor:
        return torch.where(shows, rates[context], 1 - rates[context]).log()

    return Rollouts(
        key=torch.arange(len(context)),
        context=context,
        log_pi=log_prob(policy),
        log_mu=log_prob(acting),
        log_base=log_prob(RATES),
        reward=torch.full_like(place, torch.nan),
        features=shows.double()[:, None],
    )


def fitted(rollouts: Rollouts, context: Tensor | None = None, target: Tensor = GOAL) -> float:
    log_weight = rollouts.log_base - rollouts.log_mu
    context = rollouts.context if context is None else context
    return fit_moments(rollouts.features, log_weight, context, target, ["f"]).item()


def rule_after_fit(name: str) -> TargetAscent:
    """Fitted on the rollouts of the base policy, and then shown as many of them again."""
    rule = target_of(name, GIVEN, features=("f",), fit_samples=2 * COPIES)
    first = rollouts_of(RATES, RATES)
    rule.learn(first)
    rule.learn(replace(first, key=first.key + len(first)))
    return rule


def test_lambda_gives_the_mean_over_prompts():
    assert OPTIMUM.tolist() == pytest.approx([0.417, 0.983], abs=1e-3)
    assert fitted(rollouts_of(RATES, RATES)) == pytest.approx(LAMBDA, abs=0.01)
    uniform = torch.full((2,), 0.5, dtype=torch.float64)
    assert fitted(rollouts_of(uniform, RATES)) == pytest.approx(LAMBDA, abs=0.01)  # whoever made the rollouts


def test_lambda_of_many_prompts_with_few_rollouts_each_is_not_biased_much():
    """Eight of each of 600 prompts: in nearly half of those with a rate of .1 none of the eight shows the feature."""
    generator = torch.Generator().manual_seed(0)
    context = torch.arange(600).repeat_interleave(8)
    rates = RATES[context % 2]
    features = (torch.rand(len(context), generator=generator) < rates).double()[:, None]
    weight = fit_moments(features, torch.zeros(len(context)).double(), context, GOAL, ["f"])
    assert torch.sigmoid(torch.logit(RATES) + weight).mean().item() == pytest.approx(0.7, abs=0.05)


def test_lambda_is_that_of_the_joint_law_with_one_prompt_or_a_rollout_of_each():
    rollouts = rollouts_of(RATES, RATES)
    expected = math.log(7 / 3)
    assert fitted(rollouts, torch.zeros_like(rollouts.context)) == pytest.approx(expected, abs=1e-5)
    assert fitted(rollouts, torch.arange(len(rollouts))) == pytest.approx(expected, abs=1e-5)


def test_a_mean_that_the_prompts_do_not_allow_is_refused():
    """One prompt always shows the feature and one never does: their mean is a half under any policy that a can be."""
    rollouts = rollouts_of(torch.tensor([0.0, 1.0], dtype=torch.float64), RATES)
    message = r"mean of feature f over prompts lies between 0\.5 and 0\.5 in the 2,000 rollouts .* a mean of 0\.7: "
    with pytest.raises(ValueError, match=message):
        fit_moments(rollouts.features, torch.zeros(len(rollouts)).double(), rollouts.context, GOAL, ["f"])


@pytest.mark.parametrize("acting", [RATES, OPTIMUM], ids=["the base", "the optimum"])
def test_at_the_optimum_nothing_is_left(acting):
    rule = rule_after_fit("gdc_pp")
    rollouts = rollouts_of(acting, OPTIMUM)
    weighed = rule.weigh(rollouts)
    assert weighed.metrics["constraint_gap"] == pytest.approx(0.0, abs=2e-3)
    assert weighed.metrics["kl_target"] == pytest.approx(0.0, abs=2e-3)
    assert weighed.coefficients.abs().max() < 0.02 * rollouts.weight.max() * weighed.metrics["z"]
    joint = torch.sigmoid(torch.logit(RATES) + math.log(7 / 3))
    assert rule.weigh(rollouts_of(RATES, joint)).metrics["constraint_gap"] == pytest.approx(0.12, abs=1e-3)


def test_kl_target_is_the_mean_over_prompts():
    kl = OPTIMUM * (OPTIMUM / RATES).log() + (1 - OPTIMUM) * ((1 - OPTIMUM) / (1 - RATES)).log()
    found = rule_after_fit("dpg").weigh(rollouts_of(RATES, RATES)).metrics["kl_target"]
    assert found == pytest.approx(kl.mean().item(), abs=2e-3)


@pytest.mark.parametrize("acting", [RATES, torch.tensor([0.6, 0.5], dtype=torch.float64)], ids=["on policy", "stale"])
@pytest.mark.parametrize("name", METHODS)
def test_the_direction_is_that_of_the_mean_over_prompts(name, acting):
    """Exact, for a policy whose two prompts share a parameter: the gradient of mean KL(p_c, pi), times the mean of Z,
    and not that of the joint law."""
    shared = torch.zeros((), dtype=torch.float64, requires_grad=True)
    slopes = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    rates = torch.sigmoid(torch.logit(RATES) + slopes * shared)
    rollouts = rollouts_of(acting, rates.detach())
    z = 1 - RATES + RATES * math.exp(LAMBDA)
    log_target = rollouts.log_base + LAMBDA * rollouts.features[:, 0]
    known = Densities(log_target, rollouts.log_pi, rollouts.log_mu, z[rollouts.context], z.mean().expand(len(rollouts)))
    live = torch.where(rollouts.features[:, 0] == 1, rates[rollouts.context], 1 - rates[rollouts.context]).log()
    (found,) = torch.autograd.grad(
        (advantages_of(name, known, **METHODS[name]) * live).mean(),
        shared,
        retain_graph=True,
    )
    scale = 1.0 if name == "f_dpg" else z.mean()
    gain = OPTIMUM * rates.log() + (1 - OPTIMUM) * (1 - rates).log()
    (expected,) = torch.autograd.grad(gain.mean() * scale, shared, retain_graph=True)
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)
    (joint,) = torch.autograd.grad((known.ratio * live).mean(), shared)
    assert abs(joint.item() - found.item()) > 0.1 * abs(found.item())


def test_the_adaptive_proposal_is_judged_by_the_mean_over_prompts():
    for policy, is_nearer in ((OPTIMUM, True), (1 - OPTIMUM, False)):
        rule = rule_after_fit("gdc")
        rule.should_publish()
        rule.learn(rollouts_of(RATES, policy))
        assert rule.should_publish() is is_nearer


def test_z_of_a_prompt_is_found_from_a_rollout_a_step():
    """A batch holds one rollout of each prompt; what a ratio counts approaches the mean of Z over Z of the prompt."""
    generator = torch.Generator().manual_seed(0)
    context, z = torch.tensor([5, 3]), PartitionFunction()
    truth = 1 - RATES + RATES * math.exp(LAMBDA)
    for _ in range(3000):
        z.add(context, torch.where(torch.rand(2, generator=generator) < RATES, math.exp(LAMBDA), 1.0).double())
    found, mean = z.leave_one_out(context, truth)
    assert (mean / found).tolist() == pytest.approx((truth.mean() / truth).tolist(), rel=0.05)


def test_contexts_that_were_not_seen_for_long_are_forgotten(monkeypatch):
    monkeypatch.setattr(target_estimates, "MAX_CONTEXTS", 3)
    z = PartitionFunction()
    for context in (1, 2, 3, 1, 4):
        z.add(torch.tensor([context]), torch.tensor([float(context)], dtype=torch.float64))
    assert z.state()["z_context"].tolist() == [1, 3, 4]
    assert z.state()["z_total"].tolist() == [2.0, 3.0, 4.0]
    again = PartitionFunction()
    again.load_state(z.state())
    again.add(torch.tensor([5]), torch.ones(1, dtype=torch.float64))
    assert again.state()["z_context"].tolist() == [1, 4, 5]
