"""The adversarial objective: golden numbers, and exact gradients by enumeration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from learner.objectives.adversarial_js import (
    AdversarialJs,
    data_divergence,
    importance_weights,
    leave_one_out_advantage,
    mixture_reward,
)
from learner.objectives.base import BatchCounts, EvaluatedTrajectories
from learner.ranks import Ranks
from learner.settings.objectives import AdversarialJsSettings, DiscriminatorSettings
from learner.state_tree.policy import TreePolicy
from tests.objectives import counts_of
from tests.oracle import Log, states
from tests.unit.learner.test_score_functions import all_trajectories
from tests.unit.learner.test_score_functions import model as exact_model
from tests.unit.learner.test_state_tree import BACKSPACE, HARD, build, tiny
from tests.unit.learner.test_token_objectives import dense

PIS = [0.001, 0.3, 0.9, 1.0]


def objective_of(body: str = "policy", prior: float | None = None, warmup_steps: int = 0, **settings) -> AdversarialJs:
    discriminator = DiscriminatorSettings(body=body, prior=prior, warmup_steps=warmup_steps)
    return AdversarialJs(AdversarialJsSettings(name="adversarial_js", discriminator=discriminator, **settings), Ranks())


def policy_trajectories(trajectories: Sequence[Log]) -> list[Log]:
    return [
        replace(trajectory, source="policy", temperature=1.0, logprobs=[-1.5] * len(trajectory.actions))
        for trajectory in trajectories
    ]


def divergence(p: Tensor, q: Tensor, pi: float) -> Tensor:
    """JS_pi / (pi (1 - pi)) as it is printed; KL(Q || P) at pi = 1."""
    if pi == 1.0:
        return (q * (q / p).log()).sum()
    mixture = pi * p + (1 - pi) * q
    return ((pi * p * (p / mixture).log()).sum() + ((1 - pi) * q * (q / mixture).log()).sum()) / (pi * (1 - pi))


GOLDEN = [(0.001, 0.368112), (0.1, 0.373367), (0.5, 0.406997), (0.9, 0.478601), (0.999, 0.510448), (1.0, 0.510826)]


@pytest.mark.parametrize(("pi", "expected"), GOLDEN)
def test_the_two_parts_make_the_divergence(pi, expected):
    p, q = torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5])
    log_ratio = (p / q).log()
    found = (p * data_divergence(log_ratio, pi)).sum() - (q * mixture_reward(log_ratio, pi)).sum()
    assert float(found) == pytest.approx(expected, abs=2e-6 if pi < 1 else 1e-6)
    # A discriminator that errs says less.
    for error in (torch.tensor([0.3, 0.0]), torch.tensor([-0.2, 0.5])):
        wrong = log_ratio + error
        assert (p * data_divergence(wrong, pi)).sum() - (q * mixture_reward(wrong, pi)).sum() < found


# Enumeration: every trajectory of at most three actions over two tokens, <eos> and backspace -------------------------


@pytest.fixture(scope="module")
def smallest() -> PreTrainedModel:
    return exact_model(0)


def log_probs(model: PreTrainedModel, trajectories: list[Log]) -> list[Tensor]:
    """[actions] of each trajectory, every text run alone."""
    chosen = iter([log_q[label] for _, label, log_q in dense(model, trajectories)])
    return [torch.stack([next(chosen) for _ in trajectory.actions]) for trajectory in trajectories]


@dataclass(frozen=True)
class Enumeration:
    """All trajectories, the text that each leaves, and a target over these texts. log_q: [K] of the model, with
    gradient."""

    trajectories: list[Log]
    text: Tensor
    target: Tensor
    log_q: Tensor

    @property
    def text_probability(self) -> Tensor:
        return torch.zeros_like(self.target).index_add(0, self.text, self.log_q.exp())

    @property
    def log_ratio(self) -> Tensor:
        """[K] of the text of each trajectory."""
        return (self.target / self.text_probability).log()[self.text].detach()


def enumerate_trajectories(model: PreTrainedModel) -> Enumeration:
    trajectories = all_trajectories()
    texts = [tuple(states(trajectory, BACKSPACE)[-1]) for trajectory in trajectories]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    generator = torch.Generator().manual_seed(1)
    target = torch.rand(len(numbers), generator=generator, dtype=torch.float64).square() + 0.01
    log_q = torch.stack([each.sum() for each in log_probs(model, trajectories)])
    return Enumeration(trajectories, torch.tensor([numbers[text] for text in texts]), target / target.sum(), log_q)


def judged(
    objective: AdversarialJs, model: PreTrainedModel, trajectories: list[Log], log_ratio: Tensor
) -> EvaluatedTrajectories:
    """The trajectories as a step's rollouts, with a discriminator that says `log_ratio`."""
    policy, tree = TreePolicy(model, BACKSPACE), build(trajectories)
    rollouts = objective.evaluate(policy, tree, counts_of(tree), 0)
    objective._reward_mean = float(mixture_reward(log_ratio, objective.settings.pi).mean())
    return replace(rollouts, values=rollouts.values._replace(measured=log_ratio.clone().requires_grad_()))


def test_the_enumeration_is_of_everything_that_can_happen(smallest):
    found = enumerate_trajectories(smallest)
    assert float(found.log_q.detach().exp().sum()) == pytest.approx(1.0)
    assert len(found.target) < len(found.trajectories)  # some texts are reached in several ways


@pytest.mark.parametrize("pi", PIS)
def test_the_gradient_is_that_of_the_divergence_of_texts(smallest, pi):
    """Drawn once each, by a policy for which they were equally likely: a stale one."""
    everything, objective = enumerate_trajectories(smallest), objective_of(pi=pi)
    count = len(everything.trajectories)
    drawn = [
        replace(trajectory, temperature=1.0, logprobs=[-math.log(count), *[0.0] * (len(trajectory.actions) - 1)])
        for trajectory in everything.trajectories
    ]
    rollouts = judged(objective, smallest, drawn, everything.log_ratio)
    loss, metrics = objective.rollout_loss(
        rollouts, BatchCounts(trajectories=10, actions=20, truncated_trajectories=0), 0
    )
    parameters = list(smallest.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    exact = divergence(everything.target, everything.text_probability, pi)
    expected = torch.autograd.grad(exact, parameters, allow_unused=True)
    # Half an expert trajectory per action; the others' mean is of trajectories drawn without this one.
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other * 0.5 * count / (count - 1), rtol=1e-5, atol=1e-7)
    assert float(metrics["importance_weight_mean"]) == pytest.approx(1.0)
    data = (everything.target * data_divergence((everything.target / everything.text_probability).log(), pi)).sum()
    assert float(metrics["divergence_js"] + data.detach()) == pytest.approx(float(exact.detach()), rel=1e-5)


@pytest.mark.parametrize("pi", PIS)
def test_two_stale_rollouts_have_the_gradient_as_their_mean(smallest, pi):
    """Over all pairs that another policy draws: weights and the baseline leave the estimate without bias."""
    everything, other = enumerate_trajectories(smallest), exact_model(2)
    drawn = [
        replace(trajectory, temperature=1.0, logprobs=found.tolist())
        for trajectory, found in zip(everything.trajectories, log_probs(other, everything.trajectories), strict=True)
    ]
    rollouts = judged(objective_of(pi=pi), smallest, drawn, everything.log_ratio)
    weight, reward = importance_weights(rollouts), mixture_reward(everything.log_ratio, pi)
    likely = torch.tensor([sum(trajectory.logprobs) for trajectory in drawn], dtype=torch.float64).exp()
    assert float(likely.sum()) == pytest.approx(1.0)
    assert float((weight - 1).abs().max()) > 0.5
    coefficient = torch.zeros_like(reward)
    for first, second in np.ndindex(len(drawn), len(drawn)):
        pair = torch.tensor([first, second])
        advantage = leave_one_out_advantage(reward[pair], float(reward[pair].mean()), 2)
        coefficient.index_add_(0, pair, likely[first] * likely[second] * weight[pair] * advantage / 2)
    parameters = list(smallest.parameters())
    found = torch.autograd.grad(-(coefficient @ everything.log_q), parameters, retain_graph=True, allow_unused=True)
    exact = divergence(everything.target, everything.text_probability, pi)
    for gradient, expected in zip(found, torch.autograd.grad(exact, parameters, allow_unused=True), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prior", [None, 0.2, 0.8])
def test_the_discriminator_is_best_at_the_log_ratio_whatever_its_prior(smallest, prior):
    """Experts in exact proportion to the target, each text as often as a 200th of its probability says."""
    everything, objective = enumerate_trajectories(smallest), objective_of(pi=0.4, prior=prior)
    counts = (everything.target * 200).round().clamp(min=1)
    target = counts / counts.sum()
    everything = replace(everything, target=target)
    first = {int(text): number for number, text in reversed(list(enumerate(everything.text)))}
    experts = [first[text] for text, count in enumerate(counts.int().tolist()) for _ in range(count)]
    drawn = [
        replace(
            trajectory,
            temperature=1.0,
            logprobs=[-math.log(len(everything.trajectories)), *[0.0] * (len(trajectory.actions) - 1)],
        )
        for trajectory in everything.trajectories
    ]
    scores = everything.log_ratio.requires_grad_()
    loss, _ = objective.rollout_loss(
        replace_scores(judged(objective, smallest, drawn, scores.detach()), scores), BatchCounts(1, 1, 0), 0
    )
    data = judged(
        objective, smallest, [replace(everything.trajectories[n], source="expert") for n in experts], scores.detach()
    )
    assert not data.values.q.requires_grad  # nothing of the policy learns from them
    loss = loss + objective.data_loss(replace_scores(data, scores[experts]), 0)[0]
    (gradient,) = torch.autograd.grad(loss, scores)
    of_text = torch.zeros_like(target).index_add(0, everything.text, gradient)
    assert float(gradient.abs().max()) > 1e-3  # of one way to a text alone
    torch.testing.assert_close(of_text, torch.zeros_like(of_text), rtol=0, atol=1e-8)


def replace_scores(trajectories: EvaluatedTrajectories, scores: Tensor) -> EvaluatedTrajectories:
    return replace(trajectories, values=trajectories.values._replace(measured=scores))


def test_a_constant_reward_has_no_gradient_at_all():
    """With a discriminator that says the same of every text, and rollouts that are stale."""
    model, objective = tiny("gpt2"), objective_of(pi=0.3)
    policy, tree = TreePolicy(model, BACKSPACE), build(policy_trajectories(HARD))
    counts = counts_of(tree)
    objective.begin_step(policy, [tree], counts, 0)
    with torch.no_grad():
        for parameter in objective._discriminator.head[2].parameters():
            parameter.zero_()
    objective.begin_step(policy, [tree], counts, 0)
    rollouts = objective.evaluate(policy, tree, counts, 0)
    assert importance_weights(rollouts).std() > 0
    objective.rollout_loss(rollouts, counts, 0)[0].backward()
    assert not any(parameter.grad.any() for parameter in model.parameters())
    alike = torch.full((7,), 0.7)
    assert not leave_one_out_advantage(alike, float(alike.double().sum()) / 7, 7).any()
