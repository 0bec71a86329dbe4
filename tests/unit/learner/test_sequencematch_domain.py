"""Where a divergence is not defined: the share of arguments out there is counted, and stops a run that asks for it."""

from __future__ import annotations

import pytest
import torch

from learner.objectives import make_objective
from learner.objectives.base import EvaluatedTrajectories, OutsideDomainError, combine_metrics
from learner.settings.objectives import (
    DIVERGENCES_WITH_DOMAIN,
    SequenceMatchSettings,
)
from learner.state_tree.policy import TreePolicy
from tests import oracle
from tests.objectives import counts_of
from tests.oracle import Log, walk
from tests.unit.learner.test_objectives import ALPHA, DATA, GAMMA, evaluate, settings
from tests.unit.learner.test_state_tree import BACKSPACE, EOS, build, tiny

MARGIN = SequenceMatchSettings().domain_margin


@pytest.fixture(scope="module")
def model():
    return tiny("gpt2").double()


@pytest.mark.parametrize("divergence", DIVERGENCES_WITH_DOMAIN)
def test_the_share_outside_the_domain_is_counted_and_stops_a_run_that_asks(model, divergence):
    walks = {id(trajectory): walk(model, trajectory, BACKSPACE) for trajectory in DATA}
    terms = oracle.Terms(divergence, ALPHA, GAMMA, MARGIN)
    arguments = [ALPHA * r.item() for trajectory in DATA for r in terms.residuals(walks[id(trajectory)])]
    arguments += [
        ALPHA * (1 - GAMMA) * w.v[-1].item() for trajectory in DATA if not (w := walks[id(trajectory)]).truncated
    ]
    low = oracle.PHI[divergence][1] + MARGIN
    share = sum(x < low for x in arguments) / len(arguments)
    assert 0 < share < 1  # both branches of phi were tested
    parts = [evaluate(model, trajectories, counts_of(build(DATA))) for trajectories in (DATA[:3], DATA[3:])]
    for policy in ("project", "stop"):
        objective = make_objective(settings(divergence=divergence, domain_policy=policy))
        metrics = combine_metrics(objective.data_loss(part, step=7)[1] for part in parts)
        assert float(metrics["phi_outside_fraction"]) == pytest.approx(share)
        if policy != "stop":
            objective.check(metrics, step=7)
            continue
        message = rf"^step 7: {100 * share:.2g} % of alpha r .* divergence {divergence} .*Lower alpha"
        with pytest.raises(OutsideDomainError, match=message):
            objective.check(metrics, step=7)


def test_a_tail_outside_the_domain_counts(model):
    """A value at `<eos>` far below zero: alpha (1 - gamma) V leaves the domain where no action does."""
    tree = build([Log([1], [EOS])])
    values = TreePolicy(model, BACKSPACE).evaluate(tree)
    down = values._replace(q=values.q - 40.0, v_next=values.v_next - 40.0, v_final=values.v_final - 40.0)
    objective = make_objective(settings(divergence="kl"))
    _, metrics = objective.data_loss(EvaluatedTrajectories(tree, down, counts_of(tree)), step=0)
    assert (
        float(metrics["phi_outside_fraction"]) == 1.0
    )  # r = q - 0.9 v_next fell by 4, alpha r by 1.2; the tail as well
    up = down._replace(q=down.q + 40.0)
    _, metrics = objective.data_loss(EvaluatedTrajectories(tree, up, counts_of(tree)), step=0)
    assert float(metrics["phi_outside_fraction"]) == 0.5


def test_the_tail_of_a_truncated_log_is_no_argument_of_phi(model):
    tree = build([Log([1], [], finish_reason="aborted"), Log([1], [5], finish_reason="max_actions")])
    values = TreePolicy(model, BACKSPACE).evaluate(tree)
    down = values._replace(q=values.q + 9.0, v_final=values.v_final - 1000.0)
    objective = make_objective(settings(divergence="kl"))
    _, metrics = objective.data_loss(EvaluatedTrajectories(tree, down, counts_of(tree)), step=0)
    assert float(metrics["phi_outside_fraction"]) == 0.0


def test_inside_the_domain_nothing_stops(model):
    objective = make_objective(settings(divergence="kl", domain_policy="stop", alpha=0.01))
    _, metrics = objective.data_loss(evaluate(model, DATA), step=0)
    assert float(metrics["phi_outside_fraction"]) == 0.0
    objective.check(metrics, step=0)
    for other in (settings(), settings(divergence="reverse_kl")):  # without a domain there is nothing to leave
        _, metrics = make_objective(other).data_loss(evaluate(model, DATA), step=0)
        assert "phi_outside_fraction" not in metrics
        make_objective(other).check(metrics, step=0)


@pytest.mark.parametrize("margin", [1e-4, 1e-8])
@pytest.mark.parametrize("estimator", ["collapsed", "paper"])
@pytest.mark.parametrize("divergence", DIVERGENCES_WITH_DOMAIN)
def test_the_whole_gradient_in_float32_is_that_of_float64(divergence, estimator, margin):
    """Inside the domain, where it does not depend on the margin."""
    gradients = []
    for dtype in (torch.float32, torch.float64):
        policy = tiny("gpt2").to(dtype)
        objective = make_objective(
            settings(divergence=divergence, estimator=estimator, alpha=0.01, domain_margin=margin)
        )
        loss, metrics = objective.data_loss(evaluate(policy, DATA), step=7)
        assert float(metrics["phi_outside_fraction"]) == 0.0
        loss.backward()
        gradients.append(torch.cat([each.grad.double().flatten() for each in policy.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 1 - 1e-6
    assert float(gradients[0].norm() / gradients[1].norm()) == pytest.approx(1.0, abs=1e-4)
