"""What an objective is: a pure function from evaluated action logs to a loss, and what it needs to be given.

Sums are divided by *global* counts, never by the length of a log or by what one process happens to hold: a
mean per sequence is not a proper scoring rule, and with global counts the gradients of micro-batches and
ranks simply add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from learner.action_values import ActionValues
from learner.state_tree import TreeBatch


class OutsideDomainError(ArithmeticError):
    """The loss was asked for where its divergence is not defined; the weights are as they were before the step."""


Metrics = dict[str, Tensor]
"""Scalars without gradient. Each is this call's *share*: over the micro-batches and ranks of one optimizer
step the shares add up to the value (a mean over the global batch); names that end in `_max_abs` combine by
maximum instead."""


@dataclass(frozen=True)
class LogCounts:
    """How much of something there is over all micro-batches and ranks of one optimizer step."""

    logs: int
    actions: int
    truncated_logs: int

    @classmethod
    def of(cls, trees: Iterable[TreeBatch]) -> LogCounts:
        """Counts of these trees together; it reads them, so call it before they go to an accelerator."""
        trees = list(trees)
        return cls(
            logs=sum(tree.num_logs for tree in trees),
            actions=sum(tree.num_actions for tree in trees),
            truncated_logs=sum(int(tree.truncated.sum()) for tree in trees),
        )

    def __add__(self, other: LogCounts) -> LogCounts:
        return LogCounts(
            self.logs + other.logs, self.actions + other.actions, self.truncated_logs + other.truncated_logs
        )


@dataclass(frozen=True)
class EvaluatedLogs:
    """Action logs with their values. `counts` are global: of the whole optimizer step, not of this tree."""

    tree: TreeBatch
    values: ActionValues
    counts: LogCounts

    def mean_over_actions(self, per_action: Tensor) -> Tensor:
        """This call's share of the global mean of a [A] tensor."""
        return per_action.sum() / max(self.counts.actions, 1)

    def mean_over_logs(self, terms: Tensor) -> Tensor:
        """This call's share of the global mean over logs of a sum, given all terms of all its logs."""
        return terms.sum() / max(self.counts.logs, 1)

    def mean_over_ended_logs(self, per_log: Tensor) -> Tensor:
        """This call's share of the global mean of a [L] tensor over the logs that reached `<eos>`."""
        ended = max(self.counts.logs - self.counts.truncated_logs, 1)
        return per_log.masked_fill(self.tree.truncated, 0.0).sum() / ended


class Objective(Protocol):
    """One way to train. The loss of an optimizer step is the sum of `data_loss` over the micro-batches of expert logs
    and of `rollout_loss` over those of policy logs, on all ranks. The metrics of both hold that share as `loss`.
    Before the weights move, `check` sees the metrics of the whole step.

    needs_rollouts: whether there is a `rollout_loss`; without, neither it nor `priorities` may be called.
    """

    @property
    def name(self) -> str: ...

    @property
    def needs_rollouts(self) -> bool: ...

    def data_loss(self, data: EvaluatedLogs, step: int) -> tuple[Tensor, Metrics]:
        """This call's share of what expert logs add to the loss, at optimizer step `step` (from 0)."""
        ...

    def rollout_loss(self, rollouts: EvaluatedLogs, data_counts: LogCounts, step: int) -> tuple[Tensor, Metrics]:
        """This call's share of what policy logs add to the loss. data_counts: global, of the expert logs."""
        ...

    def priorities(self, rollouts: EvaluatedLogs) -> Tensor:
        """[L] how much there is to learn from each policy log, without gradient: what prioritised replay goes by."""
        ...

    def check(self, metrics: Mapping[str, Tensor], step: int) -> None:
        """Refuse to go on, given the combined metrics of step `step`.

        Raises:
            OutsideDomainError: the settings ask to stop where the divergence is not defined, and it was not.
        """
        ...


def combine_metrics(shares: Iterable[Mapping[str, Tensor]]) -> Metrics:
    """Put the shares of micro-batches or ranks together, as the naming rule of `Metrics` says."""
    combined: Metrics = {}
    for share in shares:
        for name, value in share.items():
            if name not in combined:
                combined[name] = value
            elif name.endswith("_max_abs"):
                combined[name] = torch.maximum(combined[name], value)
            else:
                combined[name] = combined[name] + value
    return combined
