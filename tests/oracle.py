"""The slow, obvious ground truth of the learner: every text alone through the model in float64, loops in
Python.

Nothing of the state tree, the chunked values or the collapsed estimator is used here; formulas are those of
the paper (arXiv 2306.05426), term by term.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Log:
    """One action log. `realised` names the positions where noise replaced the label."""

    prompt: list[int]
    actions: list[int]
    realised: dict[int, int] = field(default_factory=dict)
    finish_reason: str = "eos"
    source: str = "expert"


def to_batch(logs: Sequence[Log]) -> pa.RecordBatch:
    """The columns of the trajectory schema that the learner reads."""
    realised = [[log.realised.get(t) for t in range(len(log.actions))] if log.realised else None for log in logs]
    ids = pa.list_(pa.int32())
    return pa.RecordBatch.from_pydict(
        {
            "source": pa.array([log.source for log in logs], pa.string()),
            "prompt_ids": pa.array([log.prompt for log in logs], ids),
            "actions": pa.array([log.actions for log in logs], ids),
            "realised": pa.array(realised, ids),
            "finish_reason": pa.array([log.finish_reason for log in logs], pa.string()),
        }
    )


def states(log: Log, backspace_id: int) -> list[list[int]]:
    """Texts s_0 .. s_N of a log, prompt included."""
    text = list(log.prompt)
    texts = [list(text)]
    for t, action in enumerate(log.actions):
        token = log.realised.get(t, action)
        if token == backspace_id:
            assert len(text) > len(log.prompt)
            text.pop()
        else:
            text.append(token)
        texts.append(list(text))
    return texts


@dataclass(frozen=True)
class Walk:
    """Values along one log: q[t] = l(a_t|s_t) for t < N and v[t] = V(s_t) for t <= N."""

    q: list[Tensor]
    v: list[Tensor]
    truncated: bool


def walk(model: PreTrainedModel, log: Log, backspace_id: int) -> Walk:
    """Run every text of the log alone. At the floor backspace is no action."""
    texts = states(log, backspace_id)
    logits = [model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1] for text in texts]
    values = []
    for text, row in zip(texts, logits, strict=True):
        if len(text) == len(log.prompt):
            row = torch.cat([row[:backspace_id], row[backspace_id + 1 :]])  # noqa: PLW2901
        values.append(row.exp().sum().log())
    return Walk([logits[t][action] for t, action in enumerate(log.actions)], values, log.finish_reason != "eos")


def chi2(x: Tensor) -> Tensor:
    """phi of the chi-squared divergence."""
    return x - x * x / 4


def cross_entropy(walks: Sequence[Walk]) -> Tensor:
    """Mean over all actions."""
    terms = [walk.v[t] - q for walk in walks for t, q in enumerate(walk.q)]
    return torch.stack(terms).mean()


def data_term(walk: Walk, alpha: float, gamma: float, phi: Callable[[Tensor], Tensor] = chi2) -> Tensor:
    """sum_t gamma^t phi(alpha r_t) / alpha and the closed form at `<eos>` (its tangent if truncated)."""
    n = len(walk.q)
    total = torch.zeros((), dtype=walk.v[0].dtype)
    for t in range(n):
        total = total + gamma**t / alpha * phi(alpha * walk.q[t] - alpha * gamma * walk.v[t + 1])
    if walk.truncated:
        return total + gamma**n * walk.v[n]
    return total + gamma**n / (alpha * (1 - gamma)) * phi(alpha * (1 - gamma) * walk.v[n])


def value_term(walk: Walk, gamma: float) -> Tensor:
    """1/2 sum_t gamma^t [V(s_t) - gamma V(s_{t+1})] and the closed form at the end."""
    n = len(walk.q)
    total = torch.zeros((), dtype=walk.v[0].dtype)
    for t in range(n):
        total = total + gamma**t / 2 * (walk.v[t] - gamma * walk.v[t + 1])
    return total + gamma**n / 2 * walk.v[n]


def squared_residual(walk: Walk, alpha: float, gamma: float, max_horizon: int) -> Tensor:
    """sum_t gamma^t (alpha r_t)^2; after `<eos>` the loop there is walked `max_horizon` steps, not summed in
    closed form."""
    n = len(walk.q)
    total = torch.zeros((), dtype=walk.v[0].dtype)
    for t in range(n):
        total = total + gamma**t * (alpha * (walk.q[t] - gamma * walk.v[t + 1])) ** 2
    if not walk.truncated:
        # In the absorbing state every action loops, so its reward is V - gamma V whatever the action.
        for t in range(n, n + max_horizon):
            total = total + gamma**t * (alpha * (walk.v[n] - gamma * walk.v[n])) ** 2
    return total


def sequencematch_loss(
    data: Sequence[Walk],
    model: Sequence[Walk],
    *,
    alpha: float,
    gamma: float,
    mixture_coefficient: float,
    shared_start: bool,
) -> Tensor:
    """-J per data action. With `shared_start` the model's value terms are V(s_0)/2 of the data, as if they
    began there."""
    horizon = math.ceil(math.log(1e-18) / math.log(gamma))
    objective = torch.stack([data_term(w, alpha, gamma) - value_term(w, gamma) for w in data]).mean()
    if shared_start:
        objective = objective - torch.stack([w.v[0] / 2 for w in data]).mean()
    else:
        objective = objective - torch.stack([value_term(w, gamma) for w in model]).mean()
    if mixture_coefficient:
        penalties = [squared_residual(w, alpha, gamma, horizon) for w in model]
        objective = objective - mixture_coefficient * torch.stack(penalties).mean()
    return -objective * len(data) / sum(len(w.q) for w in data)
