"""Cross-entropy on action logs: maximum likelihood on clean ones, behaviour cloning on those with noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.objectives.base import EvaluatedLogs, LogCounts, Metrics


@dataclass(frozen=True)
class Likelihood:
    """-E_data[log p(a|s)], mean over the actions of the global batch.

    `mle` and `behaviour_cloning` differ in the logs they are fed, not in the formula.
    """

    name: str

    @property
    def needs_rollouts(self) -> bool:
        """Expert logs are all it uses."""
        return False

    def data_loss(self, data: EvaluatedLogs, step: int) -> tuple[Tensor, Metrics]:
        """Cross-entropy of the labels."""
        loss = cross_entropy(data)
        metrics = {"loss": loss.detach(), "loss_behaviour_cloning": loss.detach(), **likelihood_metrics(data)}
        return loss, metrics

    def rollout_loss(self, rollouts: EvaluatedLogs, data_counts: LogCounts, step: int) -> tuple[Tensor, Metrics]:
        """There is none.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"objective {self.name} takes no rollouts")

    def priorities(self, rollouts: EvaluatedLogs) -> Tensor:
        """There are none.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"objective {self.name} takes no rollouts")

    def check(self, metrics: Mapping[str, Tensor], step: int) -> None:
        """Cross-entropy is defined everywhere."""


def cross_entropy(data: EvaluatedLogs) -> Tensor:
    """This call's share of the mean negative log-probability of the labels."""
    return -data.mean_over_actions(data.values.log_prob)


@torch.no_grad()  # type: ignore[untyped-decorator]
def likelihood_metrics(data: EvaluatedLogs) -> Metrics:
    """What every objective reports of its data batch."""
    values = data.values
    return {
        "log_prob_mean": data.mean_over_actions(values.log_prob),
        "value_mean": data.mean_over_actions(values.v),
        "value_eos_mean": data.mean_over_ended_logs(values.v_final),
        "backspace_prob": data.mean_over_actions(values.log_prob_backspace.exp()),
        "truncated_share": data.mean_over_logs(data.tree.truncated.to(values.v.dtype)),
    }
