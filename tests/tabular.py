"""The decision process of SequenceMatch on a table: two letters, a few deep, a free logit per state and action.

All expectations are exact, in float64: occupancies come from a linear solve, not from samples.

Legend: S texts, 4 actions (a, b, <eos>, <backspace>). An occupancy is a pair: [S, 4] discounted visits of a text and
action, and [S] of the absorbing state after <eos> there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.objectives.sequencematch import Divergence

LETTERS = "ab"
EOS, BACKSPACE = 2, 3
Occupancy = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Values:
    """Of a table under a discount: residuals r = Q - gamma V' [S, 4] and at `<eos>` [S], log-probabilities [S, 4],
    V [S]; 0 where an action is not allowed."""

    residual: Tensor
    residual_eos: Tensor
    log_prob: Tensor
    v: Tensor


class Table:
    """The process. A table of parameters is [S, 5]: logits of the actions, and V at `<eos>`."""

    def __init__(self, depth: int, gamma: float) -> None:
        self.gamma = gamma
        self.texts = ["".join(text) for n in range(depth + 1) for text in itertools.product(LETTERS, repeat=n)]
        self.index = {text: i for i, text in enumerate(self.texts)}
        size = len(self.texts)
        self.allowed = torch.ones(size, 4, dtype=torch.bool)
        self.next = torch.zeros(size, 4, dtype=torch.long)  # beyond S: the absorbing states
        for text, i in self.index.items():
            for action, letter in enumerate(LETTERS):
                self.allowed[i, action] = len(text) < depth
                self.next[i, action] = self.index.get(text + letter, 0)
            self.next[i, EOS] = size + i
            self.allowed[i, BACKSPACE] = bool(text)  # masked at the floor
            self.next[i, BACKSPACE] = self.index[text[:-1]]

    def zeros(self) -> Tensor:
        """[S, 5] parameters of the uniform policy."""
        return torch.zeros(len(self.texts), 5, dtype=torch.float64, requires_grad=True)

    def policy(self, table: Tensor) -> Tensor:
        """[S, 4] probabilities."""
        return table[:, :4].masked_fill(~self.allowed, -math.inf).softmax(1)

    def values(self, table: Tensor) -> Values:
        """Q and V of `table`, as residuals and log-probabilities."""
        logits, v_eos = table[:, :4], table[:, 4]
        v = logits.masked_fill(~self.allowed, -math.inf).logsumexp(1)
        v_next = torch.cat([v, v_eos])[self.next]
        return Values(
            residual=(logits - self.gamma * v_next).masked_fill(~self.allowed, 0.0),
            residual_eos=(1.0 - self.gamma) * v_eos,
            log_prob=(logits - v[:, None]).masked_fill(~self.allowed, 0.0),
            v=v,
        )

    def occupancy(self, policy: Tensor, gamma: float | None = None) -> Occupancy:
        """Of a policy that starts at the empty text; (I - gamma P^T) d = start."""
        gamma = self.gamma if gamma is None else gamma
        size = len(self.texts)
        moves = torch.zeros(size, size, dtype=torch.float64)
        for action in (0, 1, BACKSPACE):
            rows = self.allowed[:, action].nonzero().flatten()
            moves[rows, self.next[rows, action]] += policy[rows, action]
        start = torch.zeros(size, dtype=torch.float64)
        start[0] = 1.0
        visits = torch.linalg.solve(torch.eye(size, dtype=torch.float64) - gamma * moves.T, start)
        actions = visits[:, None] * policy
        return actions, gamma * actions[:, EOS] / (1.0 - gamma)

    def clean_occupancy(self, probabilities: Mapping[str, float]) -> Occupancy:
        """Of data that type their texts without a detour."""
        actions = torch.zeros(len(self.texts), 4, dtype=torch.float64)
        ended = torch.zeros(len(self.texts), dtype=torch.float64)
        for text, probability in probabilities.items():
            for t, letter in enumerate(text):
                actions[self.index[text[:t]], LETTERS.index(letter)] += probability * self.gamma**t
            actions[self.index[text], EOS] += probability * self.gamma ** len(text)
            ended[self.index[text]] += probability * self.gamma ** (len(text) + 1) / (1.0 - self.gamma)
        return actions, ended

    def final_texts(self, policy: Tensor) -> Tensor:
        """[S] chance that a rollout ends with each text."""
        return self.occupancy(policy, gamma=1.0 - 1e-12)[0][:, EOS]

    def backspace_rate(self, policy: Tensor) -> float:
        """Backspaces per action of a rollout."""
        actions, _ = self.occupancy(policy, gamma=1.0 - 1e-12)
        return float(actions[:, BACKSPACE].sum() / actions.sum())

    def loss(
        self, table: Tensor, data: Occupancy, model: Occupancy | None, divergence: Divergence, alpha: float
    ) -> Tensor:
        """-J, collapsed, with exact expectations; `model` where the mixture penalizes it."""
        values, margin = self.values(table), 0.1
        penalty = (data[0] * divergence.penalty(alpha * values.residual, margin)).sum()
        penalty = penalty + (data[1] * divergence.penalty(alpha * values.residual_eos, margin)).sum()
        loss = penalty / alpha - (data[0] * values.log_prob).sum()
        if model is not None:
            squares = (model[0] * values.residual.square()).sum() + (model[1] * values.residual_eos.square()).sum()
            loss = loss + alpha / 4 * squares
        return loss

    def flat(self, of_actions: Tensor, of_eos: Tensor) -> Tensor:
        """Entries of allowed actions, then of the absorbing states, as one vector."""
        return torch.cat([of_actions[self.allowed], of_eos])
