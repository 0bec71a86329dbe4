"""Whether a loss is finite on given logs: asked log by log once a step has failed, to name the bad ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

from torch import Tensor

from learner.objectives.base import EvaluatedLogs, Metrics
from learner.state_tree.action_values import ActionValues


def is_finite(logs: EvaluatedLogs, loss: Callable[[EvaluatedLogs], tuple[Tensor, Metrics]]) -> bool:
    """Whether `loss` and its gradient by the values are; the values may come from an evaluation without gradient."""
    given = {field.name: getattr(logs.values, field.name) for field in fields(ActionValues)}
    leaves = {name: value.detach().clone().requires_grad_() for name, value in given.items() if value is not None}
    share, _ = loss(replace(logs, values=ActionValues(**leaves)))
    share.backward()
    gradients = [leaf.grad for leaf in leaves.values() if leaf.grad is not None]
    return all(bool(tensor.isfinite().all()) for tensor in (share.detach(), *gradients))
