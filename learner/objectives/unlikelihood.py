"""Unlikelihood (Welleck et al. 2019, arXiv 1908.04319): likelihood, less of what the context already holds.

Per action with label y after text s, and C the distinct tokens of s (its prompt included) but y,

    -log q(y) - weight * sum over c in C of log(1 - q(c)).

Not consistent: with endless data the optimum puts less on repeated tokens than the data do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learner.objectives.base import EvaluatedLogs, Metrics, Objective
from learner.objectives.likelihood import cross_entropy, data_metrics
from learner.settings.objectives import UnlikelihoodSettings
from learner.state_tree.batch import TreeBatch

LEAST_COMPLEMENT = 1e-5
"""1 - q(c) counts as no less than this: the slope of log(1 - q) is endless at q = 1."""

PROBABLE = 0.75
"""A context token with more than this probability has its slope kept apart from that of the others."""


class Unlikelihood(Objective):
    """Cross-entropy and unlikelihood of context tokens, mean over the actions of the global batch."""

    settings: UnlikelihoodSettings

    def summation(self, tree: TreeBatch, weight: Tensor) -> ContextUnlikelihood:
        """The unlikelihood of every action."""
        return ContextUnlikelihood(tree)

    def data_loss(self, data: EvaluatedLogs, step: int) -> tuple[Tensor, Metrics]:
        """Cross-entropy of the labels, and of not drawing the tokens before them."""
        assert data.values.measured is not None
        unlikelihood = data.mean_over_actions(data.values.measured)
        loss = cross_entropy(data) + self.settings.weight * unlikelihood
        return loss, data_metrics(data, loss, loss_unlikelihood=unlikelihood)


class ContextUnlikelihood:
    """-sum of log(1 - q(c)) over the distinct tokens c of the text before each action, its label left out.

    With h(c) = q(c) / (1 - q(c)) the derivative by the logit of any id v is [v in C] h(v) - q(v) sum_C h. Near q(c) = 1
    both parts of c's own are large and nearly equal; together they are q(c) (1 - sum over the others of h). At most one
    token is that probable, so the sums keep it apart: of each action the loss, the sum of h over the others, and h of
    the probable one (0 where there is none, or where the bound on 1 - q holds and there is no slope).
    """

    def __init__(self, tree: TreeBatch) -> None:
        self._tree = tree
        self.ids: Tensor | None = torch.unique(tree.nodes.token_ids)

    def terms(self, q: Tensor, actions: Tensor, ids: Tensor) -> Tensor:
        q = q.masked_fill(~self._counted(actions, ids), 0.0)
        complement = (1 - q).clamp(min=LEAST_COMPLEMENT)
        slope = torch.where(1 - q > LEAST_COMPLEMENT, q / complement, 0.0)
        is_probable = q > PROBABLE
        loss = torch.where(is_probable, -complement.log(), -torch.log1p(-q.clamp(max=PROBABLE)))
        others, probable = slope.masked_fill(is_probable, 0.0), slope.masked_fill(~is_probable, 0.0)
        return torch.stack([loss.sum(1), others.sum(1), probable.sum(1)])

    def gradient(self, q: Tensor, sums: Tensor, actions: Tensor, ids: Tensor) -> Tensor:
        _, others, probable = sums[:, :, None]
        # Rounding may differ from that of `terms`, which has decided: what was above PROBABLE is above 1/2 here too.
        is_probable = (q > 0.5) & (probable > 0)
        is_bounded = (q > (1 + PROBABLE) / 2) & (probable == 0)
        own = torch.where(is_bounded, 0.0, q / (1 - q).clamp(min=LEAST_COMPLEMENT))
        by_v = q * (others + probable)
        of_context = torch.where(is_probable, q * (1 - others), own - by_v)
        return torch.where(self._counted(actions, ids), of_context, -by_v)

    def _counted(self, actions: Tensor, ids: Tensor) -> Tensor:
        """[a, w] whether the id stands in the text before the action, and is not its label."""
        tree = self._tree
        states, labels = tree.nodes.states[tree.actions.state[actions]], tree.actions.label[actions]
        place = torch.searchsorted(ids, tree.nodes.token_ids).clamp(max=len(ids) - 1)
        nodes = (ids[place] == tree.nodes.token_ids).nonzero().flatten()
        precedes = (nodes <= states[:, None]) & (tree.nodes.subtree_end[nodes] > states[:, None])
        seen = torch.zeros((len(actions), len(ids)), dtype=torch.uint8, device=ids.device)
        seen.scatter_reduce_(1, place[nodes].expand_as(precedes), precedes.to(torch.uint8), "amax")
        return seen.bool() & (ids != labels[:, None])
