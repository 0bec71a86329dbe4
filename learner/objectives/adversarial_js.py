"""Generalized Jensen-Shannon divergence of whole texts, by a discriminator (Huszar 2015, arXiv 1511.05101).

With P the data, Q the policy and M = pi P + (1 - pi) Q, all over whole texts after a prompt,

    JS_pi = pi KL(P || M) + (1 - pi) KL(Q || M),

which vanishes at both ends of pi, so that JS_pi / (pi (1 - pi)) is minimized: KL(P || Q) as pi -> 0 (likelihood),
KL(Q || P) as pi -> 1. A discriminator gives s = log P/Q; with
M/Q = 1 - pi + pi e^s the gradient is that of a score function,

    -E_Q[R grad log Q],   R = log(M/Q) / pi   (s at pi = 1),

up to a constant of R the softplus of the discriminator's logit, over pi. Each rollout is compared with the mean R of
the step's others, so a constant reward has no gradient at all. A stale rollout is weighted by Q(x) / mu(x), mu the
policy that made it; backspaces are actions of it like others, and the discriminator sees the text that remained.

Over whole texts the optimum is Q = P. Token by token (a one-hot label against the policy's distribution) the same
divergence is not consistent: where a binary choice has probability .7, at pi = .5 its optimum is .817.

The output of the discriminator is s(x) = logit D(x) - logit(prior), where D is the probability that x is real and
`prior` the fraction of real examples it is trained with. At its optimum s = log P/Q for any prior. s(x) is a sum
over the tokens of the answer, as log P/Q is where both write token by token: a small network sees the hidden state of
the text before a token, and the token's embedding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import layer_norm, logsigmoid, softplus
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import PreTrainedModel

from learner.objectives.base import (
    BatchCounts,
    EvaluatedTrajectories,
    Metrics,
    Objective,
    data_metrics,
    rollout_metrics,
)
from learner.ranks import Ranks
from learner.settings.objectives import AdversarialJsSettings, DiscriminatorSettings
from learner.state_tree.attention import evaluate_nodes
from learner.state_tree.batch import TreeBatch
from learner.state_tree.policy import StateLogits, TreePolicy
from learner.state_tree.vocabulary import accumulation_dtype

MAX_GRADIENT_NORM = 1.0

_NETWORK, _OPTIMIZER = "network.", "optimizer."


class Discriminator(nn.Module):  # type: ignore[misc]
    """A head of two layers on pairs of states and tokens, and its optimizer; not sharded. policy: that of the start of
    the stage; a body of its own starts as a copy of it."""

    def __init__(self, settings: DiscriminatorSettings, policy: TreePolicy) -> None:
        assert settings.body == "policy" or not isinstance(policy, FSDPModule), "a part of a body cannot be copied"
        super().__init__()
        model = policy.model
        weight = model.get_output_embeddings().weight
        size = weight.shape[1]
        self.body: PreTrainedModel | None = copy.deepcopy(model.base_model) if settings.body == "own" else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.head = nn.Sequential(nn.Linear(2 * size, size), nn.GELU(), nn.Linear(size, 1))
        self.head.to(accumulation_dtype(weight, weight))
        self.to(policy.device)
        self._autocast = policy.autocast
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(trainable, lr=settings.learning_rate, weight_decay=0.0)

    def forward(self, pairs: Tensor) -> Tensor:
        """[K] each token's term of s, given [K, 2, H] states and embeddings, which are normalized first."""
        pairs = pairs.to(self.head[0].weight.dtype)
        terms: Tensor = self.head(layer_norm(pairs, pairs.shape[-1:]).flatten(1)).squeeze(1)
        return terms

    def log_ratio(self, tree: TreeBatch, pairs: Tensor | None) -> Tensor:
        """[L] s of the last text of each trajectory; 0 for an empty answer. pairs: from `states_and_tokens`, or None if
        the discriminator has a body of its own."""
        nodes, actions = tree.answer_nodes()
        states = tree.nodes.states
        if self.body is not None:
            assert pairs is None
            with self._autocast():
                hidden = evaluate_nodes(self.body, tree)
            embedding = self.body.get_input_embeddings()(tree.nodes.token_ids[nodes])
            pairs = torch.stack([hidden[states[tree.actions.state[actions]]], embedding.to(hidden.dtype)], dim=1)
        assert pairs is not None
        terms = self.forward(pairs)
        final = states[tree.trajectories.final][:, None]
        is_left = (nodes <= final) & (tree.nodes.subtree_end[nodes] > final)
        is_answer = tree.nodes.positions[nodes] > tree.nodes.positions[states[tree.trajectories.start]][:, None]
        return (is_left & is_answer).to(terms.dtype) @ terms

    def step(self, ranks: Ranks) -> None:
        """Update the weights by the gradients of all ranks, which call this together. FloatingPointError: the gradient
        is not finite; nothing was updated."""
        trained = [parameter for parameter in self.parameters() if parameter.grad is not None]
        if ranks.size > 1:
            gradients = [parameter.grad for parameter in trained]
            own = parameters_to_vector(gradients)
            vector_to_parameters(ranks.sum_vector(own.cpu()).to(own.device), gradients)
        norm = nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
        if not norm.isfinite():
            raise FloatingPointError(
                f"the gradient of the discriminator has norm {float(norm):.4g}; lower discriminator.learning_rate"
            )
        self._optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """Weights by name, and moments of the optimizer by number of the parameter."""
        state = {_NETWORK + name: tensor for name, tensor in self.state_dict().items()}
        for number, moments in self._optimizer.state_dict()["state"].items():
            state |= {f"{_OPTIMIZER}{number}.{moment}": tensor for moment, tensor in moments.items()}
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.load_state_dict(
            {name.removeprefix(_NETWORK): each for name, each in state.items() if name.startswith(_NETWORK)}
        )
        optimizer = self._optimizer.state_dict()
        for name, tensor in state.items():
            if name.startswith(_OPTIMIZER):
                _, number, moment = name.split(".")
                optimizer["state"].setdefault(int(number), {})[moment] = tensor
        self._optimizer.load_state_dict(optimizer)


def states_and_tokens(tree: TreeBatch, logits: StateLogits) -> Tensor:
    """[K, 2, H] of each answer node the policy's hidden state before it, and its token's row of the output embedding;
    without gradient."""
    nodes, actions = tree.answer_nodes()
    hidden = logits.hidden.detach()[tree.actions.state[actions]]
    return torch.stack([hidden, logits.weight.detach()[tree.nodes.token_ids[nodes]].to(hidden.dtype)], dim=1)


class AdversarialJs(Objective):
    """Trains the policy by the score function and the discriminator by its cross-entropy.

    Each optimizer step updates both. During the first `warmup_steps` the policy does not change, since Adam would turn
    the noise of an untrained discriminator into steps of full size. The policy learns from rollouts alone, the
    discriminator from rollouts and expert trajectories, of which `discriminator_prior` is the fraction of experts.
    """

    settings: AdversarialJsSettings

    _discriminator: Discriminator | None = None
    _restored: Mapping[str, Tensor] = MappingProxyType({})
    _reward_mean = 0.0

    def begin_step(self, policy: TreePolicy, rollouts: Sequence[TreeBatch], counts: BatchCounts, step: int) -> None:
        """Compute the mean reward of the step's rollouts, the baseline of each."""
        self._discriminator_of(policy).zero_grad(set_to_none=True)
        total = torch.zeros(1, dtype=torch.float64)
        with torch.no_grad():
            for each in self._of_all_ranks(rollouts):
                tree = each.to(policy.device)
                pairs = policy.evaluate(tree, states_and_tokens).measured if self._reads_policy else None
                scores = self._discriminator_of(policy).log_ratio(tree, pairs)
                total += mixture_reward(scores, self.settings.pi).double().sum().cpu()
        self._reward_mean = float(self.ranks.sum_vector(total)) / counts.trajectories

    def evaluate(self, policy: TreePolicy, tree: TreeBatch, counts: BatchCounts, step: int) -> EvaluatedTrajectories:
        """One forward pass, and one of the discriminator's body if it has its own; `measured` is [L] s of each
        trajectory. Expert trajectories give the policy no gradient; with FSDP they give one of zero, since all ranks
        reduce together."""
        moves_policy = not bool(tree.trajectories.is_expert.all()) or isinstance(policy, FSDPModule)
        with torch.set_grad_enabled(torch.is_grad_enabled() and moves_policy):
            values = policy.evaluate(tree, states_and_tokens if self._reads_policy else None)
        scores = self._discriminator_of(policy).log_ratio(tree, values.measured)
        return EvaluatedTrajectories(tree, values._replace(measured=scores), counts)

    def data_loss(self, data: EvaluatedTrajectories, step: int) -> tuple[Tensor, Metrics]:
        scores, prior = data.values.measured, self.settings.discriminator_prior
        assert scores is not None
        loss = prior * data.mean_over_trajectories(-logsigmoid(scores + _logit(prior)))
        metrics = data_metrics(
            data,
            loss,
            loss_discriminator=loss,
            divergence_js=data.mean_over_trajectories(data_divergence(scores.detach(), self.settings.pi)),
            log_ratio_mean=data.mean_over_trajectories(scores),
        )
        if data.values.q.requires_grad:
            loss = loss + 0.0 * data.values.log_prob.sum()
        return loss, metrics

    def rollout_loss(
        self, rollouts: EvaluatedTrajectories, data_counts: BatchCounts, step: int
    ) -> tuple[Tensor, Metrics]:
        """The score function of the policy, per expert action, and what the discriminator loses on rollouts."""
        scores, prior, pi = rollouts.values.measured, self.settings.discriminator_prior, self.settings.pi
        assert scores is not None
        weight = importance_weights(rollouts)
        reward = mixture_reward(scores.detach(), pi)
        coefficient = weight * leave_one_out_advantage(reward, self._reward_mean, rollouts.counts.trajectories)
        gain = rollouts.mean_over_trajectories(coefficient[rollouts.tree.actions.trajectory] * rollouts.values.log_prob)
        if step < self.settings.discriminator.warmup_steps:
            gain = 0.0 * gain
        loss_policy = -gain * data_counts.trajectories / max(data_counts.actions, 1)
        loss_discriminator = (1.0 - prior) * rollouts.mean_over_trajectories(weight * softplus(scores + _logit(prior)))
        loss = loss_policy + loss_discriminator
        return loss, rollout_metrics(
            rollouts,
            loss,
            loss_score_function=loss_policy,
            loss_discriminator=loss_discriminator,
            divergence_js=-rollouts.mean_over_trajectories(weight * reward),
            reward_mean=rollouts.mean_over_trajectories(reward),
            log_ratio_mean_model=rollouts.mean_over_trajectories(scores),
            importance_weight_mean=rollouts.mean_over_trajectories(weight),
            importance_weight_max_abs=torch.cat([weight, weight.new_zeros(1)]).max(),
        )

    def optimizer_step(self) -> None:
        assert self._discriminator is not None, "optimizer_step() comes after begin_step()"
        self._discriminator.step(self.ranks)

    def state(self) -> dict[str, Tensor]:
        """The discriminator: weights, and moments of its optimizer."""
        return dict(self._restored) if self._discriminator is None else self._discriminator.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the discriminator of `state()`, which is created at the next use of the policy."""
        self._restored = dict(state)
        self._discriminator = None

    @property
    def _reads_policy(self) -> bool:
        return self.settings.discriminator.body == "policy"

    def _discriminator_of(self, policy: TreePolicy) -> Discriminator:
        if self._discriminator is None:
            self._discriminator = Discriminator(self.settings.discriminator, policy)
            if self._restored:
                self._discriminator.load_state(self._restored)
                self._restored = MappingProxyType({})
        return self._discriminator


def mixture_reward(log_ratio: Tensor, pi: float) -> Tensor:
    """log(M/Q) / pi at log P/Q = log_ratio, elementwise: what the policy is rewarded with. pi in (0, 1]. -E_Q of it is
    KL(Q || M) / pi, a part of JS_pi / (pi (1 - pi))."""
    if pi == 1.0:
        return log_ratio
    return (softplus(log_ratio + _logit(pi)) + math.log1p(-pi)) / pi


def data_divergence(log_ratio: Tensor, pi: float) -> Tensor:
    """log(P/M) / (1 - pi) at log P/Q = log_ratio, elementwise; 1 - Q/P in the limit pi = 1.

    E_P of it is the other part of JS_pi / (pi (1 - pi)). With any log_ratio but the true one the two parts together are
    a lower bound (at pi = 1 that of Nguyen, Wainwright and Jordan, arXiv 0809.0853).
    """
    if pi == 1.0:
        return -torch.expm1(-log_ratio)
    return (logsigmoid(log_ratio + _logit(pi)) - math.log(pi)) / (1.0 - pi)


def leave_one_out_advantage(reward: Tensor, mean: float, count: int) -> Tensor:
    """Each reward less the mean of the others, given the mean of all `count` of them."""
    return (reward - mean) * (count / (count - 1))


@torch.no_grad()  # type: ignore[untyped-decorator]
def importance_weights(rollouts: EvaluatedTrajectories) -> Tensor:
    """[L] Q(x) / mu(x) of each whole trajectory, with mu the distribution that it was sampled from."""
    per_action = rollouts.values.log_prob - rollouts.tree.actions.behavior_log_prob
    return rollouts.tree.trajectories.sum_of_actions(per_action).exp()


def _logit(probability: float) -> float:
    return math.log(probability) - math.log1p(-probability)
