"""Settings and recipes of objectives that are refused, before anything starts, with what to do."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from launch.errors import UserError
from launch.settings.recipe import read_recipe
from tests.objectives import objective_settings
from tests.unit.actors.test_scoring import ARITHMETIC

SEVEN = {"feature": "seven"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "sequencematch", "divergence": "chi2", "mixture_scale": "paper"}, "no effect"),
        ({"name": "sequencematch", "divergence": "tv"}, r"exactly maximum likelihood \(choose divergence=mle\)"),
        ({"name": "sequencematch", "divergence": "mle", "estimator": "uniform"}, "V would grow without end"),
        ({"name": "sequencematch", "divergence": "reverse_kl", "domain_policy": "stop"}, "domain_policy has no effect"),
        ({"name": "sequencematch", "domain_margin": 0.2}, "domain_margin has no effect with divergence=chi2_mixture"),
        ({"name": "sequencematch", "divergence": "js", "domain_margin": 0.7}, "less than 0.5"),
        ({"name": "sequencematch", "gamma": 1.0}, "less than 1"),
        ({"name": "sequencematch", "alpha": 0.0}, "greater than 0"),
        ({"name": "sequencematch", "lambda": 1.0}, "unknown key 'lambda'"),
        ({"name": "mle", "alpha": 0.1}, "unknown key 'alpha'"),
        ({"name": "ppo"}, "does not match any of the expected tags"),
        ({"name": "unlikelihood", "weight": 0}, "greater than 0"),
        ({"name": "emo", "mode": 3}, "1 or 2"),
        ({"name": "scheduled_sampling", "k": 0.5}, r"k=0.5 must be at least 1 with schedule=inverse_sigmoid"),
        ({"name": "scheduled_sampling", "schedule": "exponential", "k": 1.0}, "k=1.0 must be below 1"),
        ({"name": "scheduled_sampling", "schedule": "linear", "k": 2.0}, "k=2.0 must be at most 1"),
        ({"name": "scheduled_sampling", "slope": 0.1}, "slope has no effect with schedule=inverse_sigmoid"),
        ({"name": "adversarial_js", "pi": 0.0}, "pi=0 is maximum likelihood, .* choose objective mle"),
        ({"name": "adversarial_js", "pi": 1.5}, "less than or equal to 1"),
        ({"name": "adversarial_js", "discriminator": {"prior": 1.0}}, "less than 1"),
        ({"name": "adversarial_js", "discriminator": {"body": "shared"}}, "'policy' or 'own'"),
        ({"name": "dpg", "constraints": []}, "at least 1 item"),
        ({"name": "dpg", "constraints": [SEVEN, SEVEN | {"target": 0.6}]}, "constraints name a feature twice"),
        ({"name": "f_dpg", "constraints": [SEVEN]}, "divergence"),
        (
            {"name": "f_dpg", "divergence": "reverse_kl", "constraints": [SEVEN]},
            "divergence=reverse_kl is infinite while the policy breaks a pointwise constraint",
        ),
    ],
)
def test_settings_that_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        objective_settings(**values)


REINFORCE = ["stages.sequencematch.objective={name: reinforce}", "scoring.reward={name: exact_answer}"]
GDC = [
    "scoring.features={seven: {name: word, word: '7'}, length: {name: length}}",
    "stages.sequencematch.objective={name: gdc_pp, constraints: [{feature: seven, target: 0.5}]}",
]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["actors.count=0"], "stage 'sequencematch' needs rollouts, but actors.count is 0"),
        (["scoring.reward=null"], "objective reinforce raises a reward, and the recipe has none: set scoring.reward"),
        (["actors.rollout.top_p=0.9"], "actors.rollout.top_p=0.9 the sampler never makes most of them"),
        (["buffer.sampler=prioritized"], "reinforce is an expectation over rollouts"),
        (
            ["actors.rollout.backspace=false", "stages.pretrain.objective={name: behavior_cloning}"],
            "stage 'pretrain': objective behavior_cloning teaches to take noise back, and actors.rollout.backspace is",
        ),
        (["stages.sequencematch.objective={name: kl_control, beta: 0}"], "objective.beta: Input should be greater"),
    ],
)
def test_recipes_with_a_reward_that_are_refused(overrides, message):
    assert read_recipe(ARITHMETIC, REINFORCE).stages[1].objective.name == "reinforce"
    with pytest.raises(UserError) as caught:
        read_recipe(ARITHMETIC, [*REINFORCE, *overrides])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (
            "{feature: eight}",
            "needs feature 'eight', which scoring.features does not have (it has: seven, length)",
        ),
        ("{feature: seven, target: 1.0}", "leave target out, which makes it a pointwise constraint"),
        ("{feature: seven, target: -0.5}", "its mean cannot be -0.5"),
        ("{feature: length}", "feature length is not 0 or 1, so it cannot hold in each rollout: set a target"),
    ],
)
def test_recipes_with_constraints_that_are_refused(constraint, message):
    assert read_recipe(ARITHMETIC, GDC).stages[1].objective.name == "gdc_pp"
    with pytest.raises(UserError) as caught:
        read_recipe(ARITHMETIC, [*GDC, f"stages.sequencematch.objective.constraints=[{constraint}]"])
    assert message in str(caught.value)
