"""What an objective is: a function from evaluated trajectories to a loss, and how it has the trajectories evaluated.

Objectives differ in how they have a tree of trajectories evaluated (`Objective.evaluate`), in which draws they have a
loss for, and in what they remember between steps (`state`, which every checkpoint holds). Their settings say what they
need.

Sums are divided by *global* counts, never by the length of a trajectory or by what one process happens to hold: a mean
per sequence is not a proper scoring rule, and with global counts the gradients of micro-batches and ranks add up.
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
    """The loss is outside the domain of its divergence; the weights are those from before the step."""


Metrics = dict[str, Tensor]
"""Scalars without gradient. Each is the *part* that this call contributes: the parts of all micro-batches and ranks of
an optimizer step add up to the value (a mean over the global batch). Of names in `_max_abs` the maximum is taken."""


@dataclass(frozen=True)
class BatchCounts:
    """Global counts: over all micro-batches and ranks of one optimizer step."""

    trajectories: int
    actions: int
    truncated_trajectories: int

    @property
    def trajectories_per_action(self) -> float:
        """Factor from a mean over trajectories to the scale of one action."""
        return self.trajectories / max(self.actions, 1)


@dataclass(frozen=True)
class EvaluatedTrajectories:
    """Trajectories with their values. `counts` are global: of the whole optimizer step, not of this tree."""

    tree: TreeBatch
    values: ActionValues
    counts: BatchCounts

    @property
    def fraction(self) -> float:
        """This tree's fraction of the step's trajectories: the weight of a constant of the step in its metrics."""
        return self.tree.num_trajectories / max(self.counts.trajectories, 1)

    def mean_over_actions(self, per_action: Tensor) -> Tensor:
        """This call's part of the global mean of a [A] tensor."""
        return per_action.sum() / max(self.counts.actions, 1)

    def mean_over_trajectories(self, terms: Tensor) -> Tensor:
        """This call's part of the global mean over trajectories of a sum, given the terms of all its trajectories."""
        return terms.sum() / max(self.counts.trajectories, 1)

    def mean_over_ended_trajectories(self, per_trajectory: Tensor) -> Tensor:
        """This call's part of the global mean of a [L] tensor over the trajectories that reached `<eos>`."""
        ended = max(self.counts.trajectories - self.counts.truncated_trajectories, 1)
        return per_trajectory.masked_fill(self.tree.trajectories.truncated, 0.0).sum() / ended


@dataclass(eq=False)
class Objective:
    """A way to train. The loss of an optimizer step is the sum of `data_loss` over the micro-batches of expert
    trajectories and of `rollout_loss` over those of policy trajectories, on all ranks. The metrics of both hold their
    part of it as `loss`.

    ranks: those that train together. base: the frozen policy from the start of the stage, if the settings need it.
    features: names of the rollouts' features, in their order. summation: sum over the vocabulary for each action, which
    `evaluate` measures; None without one.
    """

    Options: ClassVar[type[BaseObjectiveSettings]] = BaseObjectiveSettings
    """Settings class of an objective of the user's own: `options` of the recipe, and what it needs."""
    settings: BaseObjectiveSettings
    ranks: Ranks = field(default_factory=Ranks)
    base: TreePolicy | None = None
    features: tuple[str, ...] = ()
    summation: Summation | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """A subclass sets its initial state here."""

    def begin_step(self, policy: TreePolicy, rollouts: Sequence[TreeBatch], counts: BatchCounts, step: int) -> None:
        """Process all rollouts of a step together, before any loss of the step. Called only if the objective needs
        rollouts, by all ranks together, each with its own trees (not on the policy's device yet) and global counts."""

    def evaluate(self, policy: TreePolicy, tree: TreeBatch, counts: BatchCounts, step: int) -> EvaluatedTrajectories:
        """Evaluate the trajectories of `tree` for optimizer step `step`; counts are global. All ranks call this
        together, and each runs the policy equally often."""
        return EvaluatedTrajectories(tree, policy.evaluate(tree, summation=self.summation), counts)

    def data_loss(self, data: EvaluatedTrajectories, step: int) -> tuple[Tensor, Metrics]:
        """This call's part of the loss of expert trajectories, at optimizer step `step` (from 0)."""
        raise ValueError(f"objective {self.settings.name} takes no expert trajectories")

    def rollout_loss(
        self, rollouts: EvaluatedTrajectories, data_counts: BatchCounts, step: int
    ) -> tuple[Tensor, Metrics]:
        """This call's part of the loss of policy trajectories. data_counts: global, of the expert trajectories."""
        raise ValueError(f"objective {self.settings.name} takes no rollouts")

    def priorities(self, rollouts: EvaluatedTrajectories) -> Tensor:
        """[L] priority of each policy trajectory for prioritized replay, without gradient. ValueError: the objective
        has none, since it would have to weight rollouts that are sampled more often."""
        raise ValueError(f"objective {self.settings.name} takes no prioritized samples")

    def check(self, metrics: Mapping[str, Tensor], step: int) -> None:
        """Raise OutsideDomainError if the step left the domain of the divergence and the settings ask to stop then.
        metrics: of the whole step."""

    def optimizer_step(self) -> None:
        """Update the parameters that the objective trains itself, just before the policy's are updated. All ranks call
        this together. FloatingPointError: its gradient is not finite; nothing was updated."""

    def should_publish(self) -> bool:
        """Whether to publish the current weights, at a step where publication is due; the same at every rank."""
        return True

    def state(self) -> dict[str, Tensor]:
        """The state besides the weights that later steps depend on; the same at every rank."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state()`."""
        assert not state, f"objective {self.settings.name} has no state, and was given {sorted(state)}"

    def _of_all_ranks(self, rollouts: Sequence[TreeBatch]) -> list[TreeBatch]:
        """This rank's trees, then empty ones: equally many at every rank, since FSDP gathers in each pass."""
        missing = self.ranks.maximum(len(rollouts)) - len(rollouts)
        return [*rollouts, *missing * [rollouts[0].without_trajectories()]]


def cross_entropy(data: EvaluatedTrajectories) -> Tensor:
    """This call's part of the mean negative log-probability of the labels."""
    return -data.mean_over_actions(data.values.log_prob)


@torch.no_grad()  # type: ignore[untyped-decorator]
def data_metrics(data: EvaluatedTrajectories, loss: Tensor, **own: Tensor) -> Metrics:
    """Metrics of every objective on its expert trajectories, and the objective's `own` ones; detached."""
    found = {"loss": loss, "loss_behavior_cloning": cross_entropy(data), **own, **_value_metrics(data)}
    return {name: value.detach() for name, value in found.items()}


@torch.no_grad()  # type: ignore[untyped-decorator]
def rollout_metrics(rollouts: EvaluatedTrajectories, loss: Tensor, **own: Tensor) -> Metrics:
    """Metrics of every objective on its rollouts, and the objective's `own` ones; detached."""
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


def combine_metrics(parts: Iterable[Mapping[str, Tensor]]) -> Metrics:
    """Combine the parts of micro-batches or ranks by the rule of `Metrics`."""
    combined: Metrics = {}
    for part in parts:
        for name, value in part.items():
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
    """Whether `loss` and its gradient with respect to the values are finite. The values need no gradient."""
    given = {name: value for name, value in trajectories.values._asdict().items() if value is not None}
    leaves = {name: value.detach().clone().requires_grad_() for name, value in given.items()}
    part, _ = loss(replace(trajectories, values=ActionValues(**leaves)))
    part.backward()
    gradients = [leaf.grad for leaf in leaves.values() if leaf.grad is not None]
    return all(bool(tensor.isfinite().all()) for tensor in (part.detach(), *gradients))
