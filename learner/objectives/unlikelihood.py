"""Unlikelihood (Welleck et al. 2019, arXiv 1908.04319): likelihood, less of what the context already holds.

Per action with label y after text s, and C the distinct tokens of s (its prompt included) but y,

    -log q(y) - weight * sum over c in C of log(1 - q(c)).

Not consistent: with endless data the optimum puts less on repeated tokens than the data do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from learner.objectives.base import EvaluatedLogs, ExpertObjective, LogCounts, Metrics
from learner.objectives.likelihood import cross_entropy, likelihood_metrics
from learner.settings.objectives import UnlikelihoodSettings
from learner.state_tree.action_values import CHUNK_ELEMENTS, StateLogits, accumulation_dtype
from learner.state_tree.batch import TreeBatch
from learner.state_tree.policy import TreePolicy

LEAST_COMPLEMENT = 1e-5
"""1 - q(c) counts as no less than this: the slope of log(1 - q) is endless at q = 1."""


@dataclass(frozen=True)
class Unlikelihood(ExpertObjective):
    """Cross-entropy and unlikelihood of context tokens, mean over the actions of the global batch."""

    settings: UnlikelihoodSettings
    name: str = "unlikelihood"

    def evaluate(self, policy: TreePolicy, tree: TreeBatch, counts: LogCounts, step: int) -> EvaluatedLogs:
        """One forward pass, which measures the unlikelihood of every action."""
        return EvaluatedLogs(tree, policy.evaluate(tree, context_unlikelihood), counts)

    def data_loss(self, data: EvaluatedLogs, step: int) -> tuple[Tensor, Metrics]:
        """Cross-entropy of the labels, and of not drawing the tokens before them."""
        assert data.values.measured is not None
        likelihood = cross_entropy(data)
        unlikelihood = data.mean_over_actions(data.values.measured)
        loss = likelihood + self.settings.weight * unlikelihood
        metrics = {
            "loss": loss.detach(),
            "loss_behaviour_cloning": likelihood.detach(),
            "loss_unlikelihood": unlikelihood.detach(),
            **likelihood_metrics(data),
        }
        return loss, metrics


def context_unlikelihood(tree: TreeBatch, logits: StateLogits) -> Tensor:
    """[A] -sum of log(1 - q(c)) over the distinct tokens c of the text before the action, its label left out.

    Logits are made of the tokens of the tree alone, a chunk of actions at a time, and again in the backward pass.
    """
    tokens, token_of_node = torch.unique(tree.node_ids, return_inverse=True)
    dtype = accumulation_dtype(logits.hidden, logits.weight)
    columns = logits.weight[tokens].to(dtype)
    values = logits.v_of_actions(tree)
    node = torch.arange(tree.num_padded_nodes, device=tree.node_ids.device)

    def of_chunk(hidden: Tensor, columns: Tensor, values: Tensor, states: Tensor, labels: Tensor) -> Tensor:
        precedes = (node <= states[:, None]) & (tree.subtree_end > states[:, None])
        seen = torch.zeros((len(states), len(tokens)), dtype=torch.uint8, device=node.device)
        seen.scatter_reduce_(1, token_of_node.expand_as(precedes), precedes.to(torch.uint8), "amax")
        counted = seen.bool() & (tokens != labels[:, None])
        log_q = (hidden.to(dtype) @ columns.T - values[:, None]).masked_fill(~counted, -torch.inf)
        return -(-torch.expm1(log_q)).clamp(min=LEAST_COMPLEMENT).log().sum(1)

    size = max(1, CHUNK_ELEMENTS // tree.num_padded_nodes)
    terms: list[Tensor] = []
    for rows, value, states, labels in zip(
        tree.state_row.split(size), values.split(size), tree.state.split(size), tree.action.split(size), strict=True
    ):
        arguments = (logits.hidden.index_select(0, rows), columns, value, states, labels)
        terms.append(checkpoint(of_chunk, *arguments, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(terms)
