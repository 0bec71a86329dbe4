"""What an objective is: a function from evaluated trajectories to a loss, and how it has the trajectories evaluated.

Objectives differ in how they have a tree of trajectories evaluated (`Objective.evaluate`), in which draws they have a
loss for,
and in what they remember between steps (`state`, which every checkpoint holds). Their settings say what they need.

Sums are divided by *global* counts, never by the length of a trajectory or by what one process happens to hold: a mean
per
sequence is not a proper scoring rule, and with global counts the gradients of micro-batches and ranks add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from learner.ranks import Ranks
from learner.settings.objectives import BaseObjectiveSettings
from learner.state_tree.batch import TreeBatch
from learner.state_tree.policy import ActionValues, Summation, TreePolicy


class OutsideDomainError(ArithmeticError):
    """The loss was asked for where its divergence is not defined; the weights are as they were before the step."""


Metrics = dict[str, Tensor]
"""Scalars without gradient. Each is this call's *share*: over the micro-batches and ranks of one optimizer
step the shares add up to the value (a mean over the global batch); names that end in `_max_abs` combine by
maximum instead."""


@dataclass(frozen=True)
class BatchCounts:
    """How much of something there is over all micro-batches and ranks of one optimizer step."""

    trajectories: int
    actions: int
    truncated_trajectories: int

    @property
    def trajectories_per_action(self) -> float:
        """From a mean over trajectories to the scale of one action."""
        return self.trajectories / max(self.actions, 1)


@dataclass(frozen=True)
class EvaluatedTrajectories:
    """Action trajectories with their values. `counts` are global: of the whole optimizer step, not of this tree."""

    tree: TreeBatch
    values: ActionValues
    counts: BatchCounts

    @property
    def share(self) -> float:
        """Of all trajectories of the step, those of this tree: what a constant of the step counts in its metrics."""
        return self.tree.num_trajectories / max(self.counts.trajectories, 1)

    def mean_over_actions(self, per_action: Tensor) -> Tensor:
        """This call's share of the global mean of a [A] tensor."""
        return per_action.sum() / max(self.counts.actions, 1)

    def mean_over_trajectories(self, terms: Tensor) -> Tensor:
        """This call's share of the global mean over trajectories of a sum, given all terms of all its trajectories."""
        return terms.sum() / max(self.counts.trajectories, 1)

    def mean_over_ended_trajectories(self, per_trajectory: Tensor) -> Tensor:
        """This call's share of the global mean of a [L] tensor over the trajectories that reached `<eos>`."""
        ended = max(self.counts.trajectories - self.counts.truncated_trajectories, 1)
        return per_trajectory.masked_fill(self.tree.trajectories.truncated, 0.0).sum() / ended


@dataclass(eq=False)
class Objective:
    """One way to train. The loss of an optimizer step is the sum of `data_loss` over the micro-batches of expert
    trajectories
    and of `rollout_loss` over those of policy trajectories, on all ranks. The metrics of both hold that share as
    `loss`.

    ranks: that train together. base: the policy as it was at the start of the stage, frozen; where the settings need
    it. features: names of those that rollouts have, in their order. summation: over the vocabulary, of each action,
    which `evaluate` measures; a method of an objective that has one.
    """

    Options: ClassVar[type[BaseObjectiveSettings]] = BaseObjectiveSettings
    """The class of the settings of an objective of the user's own: `options` of the recipe, and what it needs."""
    settings: BaseObjectiveSettings
    ranks: Ranks = field(default_factory=Ranks)
    base: TreePolicy | None = None
    features: tuple[str, ...] = ()
    summation: Summation | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """An objective sets here what it begins with."""

    def begin_step(self, policy: TreePolicy, rollouts: Sequence[TreeBatch], counts: BatchCounts, step: int) -> None:
        """Look at all rollouts of a step before any loss of it is asked for: for what concerns them together. All ranks
        call this together, each with trees of its own (not on the policy's device yet) and the global counts; only
        where rollouts are needed."""

    def evaluate(self, policy: TreePolicy, tree: TreeBatch, counts: BatchCounts, step: int) -> EvaluatedTrajectories:
        """Have the trajectories of `tree` evaluated for optimizer step `step`; counts are global. All ranks call this
        together,
        and it runs the policy as many times at each."""
        return EvaluatedTrajectories(tree, policy.evaluate(tree, summation=self.summation), counts)

    def data_loss(self, data: EvaluatedTrajectories, step: int) -> tuple[Tensor, Metrics]:
        """This call's share of what expert trajectories add to the loss, at optimizer step `step` (from 0)."""
        raise ValueError(f"objective {self.settings.name} takes no expert trajectories")

    def rollout_loss(
        self, rollouts: EvaluatedTrajectories, data_counts: BatchCounts, step: int
    ) -> tuple[Tensor, Metrics]:
        """This call's share of what policy trajectories add to the loss. data_counts: global, of the expert
        trajectories."""
        raise ValueError(f"objective {self.settings.name} takes no rollouts")

    def priorities(self, rollouts: EvaluatedTrajectories) -> Tensor:
        """[L] how much there is to learn from each policy trajectory, without gradient, for prioritized replay.
        ValueError:
        there are none, since draws that prefer some rollouts would have to be weighted for it."""
        raise ValueError(f"objective {self.settings.name} takes no prioritized draws")

    def check(self, metrics: Mapping[str, Tensor], step: int) -> None:
        """Given the combined metrics of a step: raise OutsideDomainError where the settings ask
        to stop at the end of the divergence's domain, and it was left."""

    def optimizer_step(self) -> None:
        """Take a step with what the objective trains itself, just before the policy's weights move. All ranks call this
        together. FloatingPointError: its gradient is not finite, and nothing has moved."""

    def should_publish(self) -> bool:
        """Whether the policy of now should be the one that makes rollouts: asked where it would be published, and the
        same at every rank."""
        return True

    def state(self) -> dict[str, Tensor]:
        """What the next steps depend on besides the weights; the same at every rank."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state()`."""
        assert not state, f"objective {self.settings.name} remembers nothing, and was given {sorted(state)}"

    def _of_all_ranks(self, rollouts: Sequence[TreeBatch]) -> list[TreeBatch]:
        """Those of this rank, then trees without trajectories: as many at every rank, since FSDP gathers in each
        pass."""
        missing = self.ranks.maximum(len(rollouts)) - len(rollouts)
        return [*rollouts, *missing * [rollouts[0].without_trajectories()]]


def cross_entropy(data: EvaluatedTrajectories) -> Tensor:
    """This call's share of the mean negative log-probability of the labels."""
    return -data.mean_over_actions(data.values.log_prob)


@torch.no_grad()  # type: ignore[untyped-decorator]
def data_metrics(data: EvaluatedTrajectories, loss: Tensor, **own: Tensor) -> Metrics:
    """What every objective reports of its expert trajectories, and what this one adds (detached)."""
    found = {"loss": loss, "loss_behavior_cloning": cross_entropy(data), **own, **_value_metrics(data)}
    return {name: value.detach() for name, value in found.items()}


@torch.no_grad()  # type: ignore[untyped-decorator]
def rollout_metrics(rollouts: EvaluatedTrajectories, loss: Tensor, **own: Tensor) -> Metrics:
    """What every objective reports of its rollouts, and what this one adds (detached)."""
    of_values = {f"{name}_model": value for name, value in _value_metrics(rollouts).items()}
    return {name: value.detach() for name, value in {"loss": loss, **own, **of_values}.items()}


def _value_metrics(trajectories: EvaluatedTrajectories) -> Metrics:
    values = trajectories.values
    return {
        "log_prob_mean": trajectories.mean_over_actions(values.log_prob),
        "value_mean": trajectories.mean_over_actions(values.v),
        "value_eos_mean": trajectories.mean_over_ended_trajectories(values.v_final),
        "backspace_prob": trajectories.mean_over_actions(values.log_prob_backspace.exp()),
        "truncated_fraction": trajectories.mean_over_trajectories(
            trajectories.tree.trajectories.truncated.to(values.v.dtype)
        ),
    }


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


def is_finite(
    trajectories: EvaluatedTrajectories, loss: Callable[[EvaluatedTrajectories], tuple[Tensor, Metrics]]
) -> bool:
    """Whether `loss` and its gradient by the values are; the values may come from an evaluation without gradient."""
    given = {name: value for name, value in trajectories.values._asdict().items() if value is not None}
    leaves = {name: value.detach().clone().requires_grad_() for name, value in given.items()}
    share, _ = loss(replace(trajectories, values=ActionValues(**leaves)))
    share.backward()
    gradients = [leaf.grad for leaf in leaves.values() if leaf.grad is not None]
    return all(bool(tensor.isfinite().all()) for tensor in (share.detach(), *gradients))
