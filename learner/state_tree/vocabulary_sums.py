"""Sums over the vocabulary that an objective wants of each action, with their gradient at the logits.

A loss of the probabilities q before an action has a gradient at the logits in two parts: what it says of each id, and
what it says of V, by which all probabilities are normalized. Where the policy is nearly certain the two are large and
nearly cancel. So an objective gives the gradient at the logits with both parts together, and that is added to the
gradient of Q and V in float32, before a product with the output embedding or the states rounds it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from buffer.trajectory.schema import IdRanges
from learner.state_tree.batch import Actions, TreeBatch
from learner.state_tree.products import VOCABULARY_CHUNK, fill_ids, matmul, matmul_operand

TENSORS_PER_CHUNK = 4
"""As large as a chunk of probabilities, at hand while its terms are made."""


class VocabularySum(Protocol):
    """K sums over ids v for each action, of terms of q(v); the first one is what the loss is made of.

    Legend: a actions of a chunk, w ids of a chunk. q is the policy before the action, 0 where backspace is masked and
    of ids without a token.
    """

    @property
    def ids(self) -> Tensor | None:
        """[U] ascending ids that have terms; None = all that have a token."""

    def terms(self, q: Tensor, actions: Tensor, ids: Tensor) -> Tensor:
        """[K, a] sums over `ids` [w] alone. q: [a, w]. actions: [a] indexes of actions of the tree."""

    def gradient(self, q: Tensor, sums: Tensor, actions: Tensor, ids: Tensor) -> Tensor:
        """[a, w] derivative of the first sum by the logits of `ids`, that through V included. sums: [K, a] over all."""


Summation = Callable[[TreeBatch, Tensor], VocabularySum]
"""What an objective sums for the actions of a tree, given the output embedding [V, H]. It runs inside the model's
forward pass, where the ranks have the output embedding whole."""


class ActionSums:
    """A `VocabularySum` for all actions of a tree, as the chunks of states x vocabulary of the values need it."""

    def __init__(
        self,
        summed: VocabularySum,
        actions: Actions,
        backspace_id: int,
        ids_without_token: IdRanges,
        chunk_elements: int,
    ) -> None:
        self._summed = summed
        self._rows = actions.state
        self._backspace_masked = actions.backspace_masked
        self._backspace_id = backspace_id
        self._ids_without_token = ids_without_token
        self._elements = max(1, chunk_elements // TENSORS_PER_CHUNK)

    def forward(self, hidden: Tensor, weight: Tensor, v_floor: Tensor, q_backspace: Tensor) -> Tensor:
        """[A] the first sum of each action. hidden: [M, H]. weight: [V, H]. v_floor, q_backspace: [M]."""
        v_all = torch.logaddexp(v_floor, q_backspace)
        v = torch.where(self._backspace_masked, v_floor[self._rows], v_all[self._rows])
        self._share = (v_floor[self._rows] - v).exp()  # of all probability, the ids but backspace
        self._backspace = (q_backspace[self._rows] - v).exp().masked_fill(self._backspace_masked, 0.0)
        ids = self._summed.ids
        if ids is None:
            is_action = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
            fill_ids(is_action, self._ids_without_token, False)
            ids = is_action.nonzero().flatten()
        width = min(len(ids), VOCABULARY_CHUNK, self._elements)
        states = matmul_operand(hidden, weight)
        total: Tensor | None = None
        for chunk in ids.split(width):
            columns = matmul_operand(weight[chunk], hidden).T
            found: list[Tensor] = []
            for actions in torch.arange(len(self._rows), device=v.device).split(max(1, self._elements // width)):
                logits = matmul(states[self._rows[actions]], columns)
                q = self._with_backspace(logits.sub_(v[actions, None]).exp_(), actions, chunk)
                found.append(self._summed.terms(q, actions, chunk))
            terms = torch.cat(found, dim=1)
            total = terms if total is None else total + terms
        assert total is not None, "a vocabulary has ids"
        self._sums = total
        return self._sums[0].clone()

    def prepare_backward(self, grad: Tensor, states: list[tuple[int, int]]) -> None:
        """Begin a backward pass. grad: [A] of the first sum. states: begin and end of each chunk of states."""
        self._grad = grad
        self._order = torch.argsort(self._rows, stable=True)
        edges = torch.tensor([begin for begin, _ in states] + [end for _, end in states[-1:]], device=grad.device)
        bounds = torch.searchsorted(self._rows[self._order], edges).tolist()
        self._actions_of = dict(zip(states, itertools.pairwise(bounds), strict=True))

    def gradient(self, probabilities: Tensor, states: tuple[int, int], vocabulary: tuple[int, int]) -> Tensor:
        """[m, w] gradient at the logits of a chunk. probabilities: [m, w] over all ids but backspace."""
        ids = torch.arange(*vocabulary, device=probabilities.device)
        found = torch.zeros_like(probabilities)
        first, last = self._actions_of[states]
        for actions in self._order[first:last].split(max(1, self._elements // len(ids))):
            rows = self._rows[actions] - states[0]
            q = self._with_backspace(probabilities[rows] * self._share[actions, None], actions, ids)
            gradient = self._summed.gradient(q, self._sums[:, actions], actions, ids)
            found.index_add_(0, rows, gradient * self._grad[actions, None])
        return found

    def _with_backspace(self, q: Tensor, actions: Tensor, ids: Tensor) -> Tensor:
        return torch.where(ids == self._backspace_id, self._backspace[actions, None], q)
