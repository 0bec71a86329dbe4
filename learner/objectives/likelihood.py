"""Cross-entropy on action logs: maximum likelihood on clean ones, behaviour cloning on those with noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from learner.objectives.base import EvaluatedLogs, ExpertObjective, Metrics


@dataclass(frozen=True)
class Likelihood(ExpertObjective):
    """-E_data[log p(a|s)], mean over the actions of the global batch.

    `mle` and `behaviour_cloning` differ in the logs they are fed, not in the formula.
    """

    name: str

    def data_loss(self, data: EvaluatedLogs, step: int) -> tuple[Tensor, Metrics]:
        """Cross-entropy of the labels."""
        loss = cross_entropy(data)
        metrics = {"loss": loss.detach(), "loss_behaviour_cloning": loss.detach(), **likelihood_metrics(data)}
        return loss, metrics


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
        "truncated_share": data.mean_over_logs(data.tree.trajectories.truncated.to(values.v.dtype)),
    }
