"""The discriminator of adversarial objectives: an estimate of log P(x) / Q(x) for whole texts x after their prompts.

Its output is s(x) = logit D(x) - logit(prior), where D is the probability that x is real and `prior` the share of real
examples it is trained with. At its optimum s = log P/Q whatever the prior was, so one discriminator serves every
mixture of data and model: D for another share pi is sigmoid(s + logit pi).

s(x) is a sum over the tokens of the answer, as log P/Q is where both write token by token: a small network sees the
hidden state of the text before a token, and the token's embedding.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import layer_norm
from transformers import PreTrainedModel

from learner.ranks import Ranks
from learner.settings.objectives import DiscriminatorSettings
from learner.state_tree.attention import evaluate_nodes
from learner.state_tree.batch import TreeBatch
from learner.state_tree.policy import StateLogits, TreePolicy
from learner.state_tree.vocabulary import accumulation_dtype

MAX_GRADIENT_NORM = 1.0

_NETWORK, _OPTIMIZER = "network.", "optimizer."


class DiscriminatorNetwork(nn.Module):  # type: ignore[misc]
    """A head of two layers on pairs of states and tokens. body: whose hidden states; None: the policy's."""

    def __init__(self, hidden_size: int, dtype: torch.dtype, seed: int, body: PreTrainedModel | None) -> None:
        super().__init__()
        self.body = body
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Sequential(nn.Linear(2 * hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, 1))
        self.head.to(dtype)

    def forward(self, pairs: Tensor) -> Tensor:
        """[K] what each token adds to s, given [K, 2, H] states and embeddings, whose scales do not matter."""
        pairs = pairs.to(self.head[0].weight.dtype)
        terms: Tensor = self.head(layer_norm(pairs, pairs.shape[-1:]).flatten(1)).squeeze(1)
        return terms


class Discriminator:
    """The network and its optimizer, whole at every rank. policy: as it is at the start of the stage; an own body
    begins as a copy of it."""

    def __init__(self, settings: DiscriminatorSettings, policy: TreePolicy) -> None:
        assert settings.body == "policy" or not isinstance(policy, FSDPModule), "a part of a body cannot be copied"
        model = policy.model
        body = copy.deepcopy(model.base_model) if settings.body == "own" else None
        weight = model.get_output_embeddings().weight
        dtype = accumulation_dtype(weight, weight)
        self._autocast = policy.autocast
        self.network = DiscriminatorNetwork(weight.shape[1], dtype, settings.seed, body).to(policy.device)
        trainable = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(trainable, lr=settings.learning_rate, weight_decay=0.0)

    def log_ratio(self, tree: TreeBatch, policy_pairs: Tensor | None) -> Tensor:
        """[L] s of the last text of each log; 0 where nothing of an answer is left.

        policy_pairs: what `states_and_tokens` measured of the policy; None exactly with a body of its own.
        """
        nodes, actions = tree.answer_nodes()
        states, pairs = tree.nodes.states, policy_pairs
        if self.network.body is not None:
            assert policy_pairs is None
            with self._autocast():
                hidden = evaluate_nodes(self.network.body, tree)
            embedding = self.network.body.get_input_embeddings()(tree.nodes.token_ids[nodes])
            pairs = torch.stack([hidden[states[tree.actions.state[actions]]], embedding.to(hidden.dtype)], dim=1)
        assert pairs is not None
        terms: Tensor = self.network(pairs)
        final = states[tree.trajectories.final][:, None]
        is_left = (nodes <= final) & (tree.nodes.subtree_end[nodes] > final)
        is_answer = tree.nodes.positions[nodes] > tree.nodes.positions[states[tree.trajectories.start]][:, None]
        return (is_left & is_answer).to(terms.dtype) @ terms

    def forget_gradients(self) -> None:
        """Begin a step."""
        self._optimizer.zero_grad(set_to_none=True)

    def step(self, ranks: Ranks) -> None:
        """Move the weights by what the backward passes of all ranks left; all of them call this together.
        FloatingPointError: the gradient is not finite; nothing has moved."""
        trained = [parameter for parameter in self.network.parameters() if parameter.grad is not None]
        if ranks.size > 1:
            gradients = [parameter.grad for parameter in trained]
            summed = ranks.sum_vector(torch.cat([gradient.flatten() for gradient in gradients]).cpu())
            parts = summed.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        norm = nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
        if not norm.isfinite():
            raise FloatingPointError(
                f"the gradient of the discriminator has norm {float(norm):.4g}; lower discriminator.learning_rate"
            )
        self._optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """Weights, and moments of the optimizer, by name."""
        state = {_NETWORK + name: tensor for name, tensor in self.network.state_dict().items()}
        for name, parameter in self.network.named_parameters():
            moments = self._optimizer.state.get(parameter, {})
            state |= {f"{_OPTIMIZER}{name}.{moment}": tensor for moment, tensor in moments.items()}
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state()`."""

        def below(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): each for name, each in state.items() if name.startswith(prefix)}

        self.network.load_state_dict(below(_NETWORK))
        whole = self._optimizer.state_dict()
        trained = [name for name, parameter in self.network.named_parameters() if parameter.requires_grad]
        moments = {number: below(f"{_OPTIMIZER}{name}.") for number, name in enumerate(trained)}
        whole["state"] = {number: found for number, found in moments.items() if found}
        self._optimizer.load_state_dict(whole)


def states_and_tokens(tree: TreeBatch, logits: StateLogits) -> Tensor:
    """[K, 2, H] of each answer node the policy's hidden state before it, and its token's row of the output embedding;
    without gradient."""
    nodes, actions = tree.answer_nodes()
    hidden = logits.hidden.detach()[tree.actions.state[actions]]
    return torch.stack([hidden, logits.weight.detach()[tree.nodes.token_ids[nodes]].to(hidden.dtype)], dim=1)
