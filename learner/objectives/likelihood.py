"""Cross-entropy on action logs: maximum likelihood on clean ones, behaviour cloning on those with noise."""

from __future__ import annotations

import torch
from torch import Tensor

from learner.objectives.base import EvaluatedLogs, Metrics, Objective


class Likelihood(Objective):
    """-E_data[log p(a|s)], mean over the actions of the global batch.

    `mle` and `behaviour_cloning` differ in the logs they are fed, not in the formula.
    """

    def data_loss(self, data: EvaluatedLogs, step: int) -> tuple[Tensor, Metrics]:
        """Cross-entropy of the labels."""
        loss = cross_entropy(data)
        return loss, data_metrics(data, loss)


def cross_entropy(data: EvaluatedLogs) -> Tensor:
    """This call's share of the mean negative log-probability of the labels."""
    return -data.mean_over_actions(data.values.log_prob)


@torch.no_grad()  # type: ignore[untyped-decorator]
def data_metrics(data: EvaluatedLogs, loss: Tensor, **own: Tensor) -> Metrics:
    """What every objective reports of its expert logs, and what this one adds (detached)."""
    found = {"loss": loss, "loss_behaviour_cloning": cross_entropy(data), **own, **_value_metrics(data)}
    return {name: value.detach() for name, value in found.items()}


@torch.no_grad()  # type: ignore[untyped-decorator]
def rollout_metrics(rollouts: EvaluatedLogs, loss: Tensor, **own: Tensor) -> Metrics:
    """What every objective reports of its rollouts, and what this one adds (detached)."""
    of_values = {f"{name}_model": value for name, value in _value_metrics(rollouts).items()}
    return {name: value.detach() for name, value in {"loss": loss, **own, **of_values}.items()}


def _value_metrics(logs: EvaluatedLogs) -> Metrics:
    values = logs.values
    return {
        "log_prob_mean": logs.mean_over_actions(values.log_prob),
        "value_mean": logs.mean_over_actions(values.v),
        "value_eos_mean": logs.mean_over_ended_logs(values.v_final),
        "backspace_prob": logs.mean_over_actions(values.log_prob_backspace.exp()),
        "truncated_share": logs.mean_over_logs(logs.tree.trajectories.truncated.to(values.v.dtype)),
    }
