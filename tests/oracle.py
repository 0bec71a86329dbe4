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

from buffer.trajectory.schema import SAMPLING_TYPE


@dataclass(frozen=True)
class Log:
    """One trajectory. `executed` names the positions where noise replaced the label."""

    prompt: list[int]
    actions: list[int]
    executed: dict[int, int] = field(default_factory=dict)
    finish_reason: str = "eos"
    source: str = "expert"
    id: str = ""
    logprobs: list[float] | None = None
    versions: list[int] | None = None
    temperature: float | None = None
    top_p: float = 1.0
    offers_backspace: bool = True
    reward: float | None = None
    features: list[float] | None = None


def to_batch(trajectories: Sequence[Log]) -> pa.RecordBatch:
    """The columns of the trajectory schema that the learner reads."""
    executed = [
        [trajectory.executed.get(t) for t in range(len(trajectory.actions))] if trajectory.executed else None
        for trajectory in trajectories
    ]
    ids = pa.list_(pa.int32())
    return pa.RecordBatch.from_pydict(
        {
            "id": pa.array([trajectory.id for trajectory in trajectories], pa.string()),
            "source": pa.array([trajectory.source for trajectory in trajectories], pa.string()),
            "prompt_ids": pa.array([trajectory.prompt for trajectory in trajectories], ids),
            "actions": pa.array([trajectory.actions for trajectory in trajectories], ids),
            "executed": pa.array(executed, ids),
            "logprobs": pa.array([trajectory.logprobs for trajectory in trajectories], pa.list_(pa.float32())),
            "policy_version": pa.array([trajectory.versions for trajectory in trajectories], ids),
            "finish_reason": pa.array([trajectory.finish_reason for trajectory in trajectories], pa.string()),
            "sampling": pa.array(
                [
                    None
                    if trajectory.temperature is None
                    else {
                        "temperature": trajectory.temperature,
                        "top_p": trajectory.top_p,
                        "backspace": trajectory.offers_backspace,
                    }
                    for trajectory in trajectories
                ],
                SAMPLING_TYPE,
            ),
            "reward": pa.array([trajectory.reward for trajectory in trajectories], pa.float32()),
            "features": pa.array([trajectory.features for trajectory in trajectories], pa.list_(pa.float32())),
        }
    )


def states(trajectory: Log, backspace_id: int) -> list[list[int]]:
    """Texts s_0 .. s_N of a trajectory, prompt included."""
    text = list(trajectory.prompt)
    texts = [list(text)]
    for t, action in enumerate(trajectory.actions):
        token = trajectory.executed.get(t, action)
        if token == backspace_id:
            assert len(text) > len(trajectory.prompt)
            text.pop()
        else:
            text.append(token)
        texts.append(list(text))
    return texts


@dataclass(frozen=True)
class Walk:
    """Values along one trajectory: q[t] = l(a_t|s_t) for t < N and v[t] = V(s_t) for t <= N."""

    q: list[Tensor]
    v: list[Tensor]
    truncated: bool


def walk(model: PreTrainedModel, trajectory: Log, backspace_id: int) -> Walk:
    """Run every text of the trajectory alone. At the floor backspace is no action, and nowhere if it was never
    offered."""
    texts = states(trajectory, backspace_id)
    logits = [model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1] for text in texts]
    values = []
    for text, row in zip(texts, logits, strict=True):
        if len(text) == len(trajectory.prompt) or not trajectory.offers_backspace:
            row = torch.cat([row[:backspace_id], row[backspace_id + 1 :]])  # noqa: PLW2901
        values.append(row.exp().sum().log())
    return Walk(
        [logits[t][action] for t, action in enumerate(trajectory.actions)], values, trajectory.finish_reason != "eos"
    )


PHI: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "chi2": (lambda x: x - x * x / 4, -math.inf),
    "chi2_mixture": (lambda x: x - x * x / 4, -math.inf),
    "kl": (lambda x: (1 + x).log(), -1.0),
    "reverse_kl": (lambda x: 1 - (-x).exp(), -math.inf),
    "js": (lambda x: (2 - (-x).exp()).log(), -math.log(2)),
    "hellinger": (lambda x: x / (1 + x), -1.0),
    "mle": (lambda x: x, -math.inf),
}
"""phi and the lower end of its domain, by divergence, as SequenceMatch's convention prints them."""


def phi(divergence: str, x: Tensor, margin: float) -> Tensor:
    """phi of one number; below its domain's end + margin the tangent there, found by automatic differentiation."""
    formula, low = PHI[divergence]
    if x.item() >= low + margin:
        return formula(x)
    joint = torch.tensor(low + margin, dtype=x.dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(formula(joint), joint)
    return formula(joint).detach() + slope * (x - joint.detach())


def cross_entropy(walks: Sequence[Walk]) -> Tensor:
    """Mean over all actions."""
    terms = [walk.v[t] - q for walk in walks for t, q in enumerate(walk.q)]
    return torch.stack(terms).mean()


@dataclass(frozen=True)
class Terms:
    """The sums of the paper under one choice of weights.

    uniform: weight 1 for every action, and for the first step after `<eos>`; gamma^t otherwise.
    """

    divergence: str
    alpha: float
    gamma: float
    margin: float
    uniform: bool = False

    def weight(self, t: int) -> float:
        """Of action t of a trajectory."""
        return 1.0 if self.uniform else self.gamma**t

    def loop_weights(self, n: int) -> list[float]:
        """Of the steps in the absorbing state after n actions, walked until nothing is left."""
        horizon = math.ceil(math.log(1e-18) / math.log(self.gamma))
        return [self.weight(n) * self.gamma**t for t in range(horizon)]

    def residuals(self, walk: Walk) -> list[Tensor]:
        """r_t of every action."""
        return [q - self.gamma * walk.v[t + 1] for t, q in enumerate(walk.q)]

    def reward(self, walk: Walk) -> Tensor:
        """sum_t w_t phi(alpha r_t) / alpha and the loop at `<eos>` (the tangent of its closed form if truncated)."""
        n = len(walk.q)
        terms = [
            self.weight(t) / self.alpha * phi(self.divergence, self.alpha * r, self.margin)
            for t, r in enumerate(self.residuals(walk))
        ]
        if walk.truncated:
            terms.append(self.weight(n) * walk.v[n])
        else:
            # In the absorbing state every action loops, so its reward is V - gamma V whatever the action.
            looped = phi(self.divergence, self.alpha * (walk.v[n] - self.gamma * walk.v[n]), self.margin)
            terms.append(sum(self.loop_weights(n)) / self.alpha * looped)
        return torch.stack(terms).sum()

    def values(self, walk: Walk) -> Tensor:
        """1/2 sum_t w_t [V(s_t) - gamma V(s_{t+1})] and the closed form at the end."""
        n = len(walk.q)
        steps = [self.weight(t) / 2 * (walk.v[t] - self.gamma * walk.v[t + 1]) for t in range(n)]
        return torch.stack([*steps, self.weight(n) / 2 * walk.v[n]]).sum()

    def squared_residual(self, walk: Walk) -> Tensor:
        """sum_t w_t (alpha r_t)^2 and the loop at `<eos>` (none if truncated)."""
        n = len(walk.q)
        terms = [self.weight(t) * (self.alpha * r) ** 2 for t, r in enumerate(self.residuals(walk))]
        terms.append(torch.zeros((), dtype=walk.v[0].dtype))
        if not walk.truncated:
            looped = walk.v[n] - self.gamma * walk.v[n]
            terms.append(sum(self.loop_weights(n)) * (self.alpha * looped) ** 2)
        return torch.stack(terms).sum()


def sequencematch_loss(
    terms: Terms, data: Sequence[Walk], model: Sequence[Walk], *, rollout_penalty: float, shared_start: bool
) -> Tensor:
    """-J per data action. With `shared_start` the model's value terms are V(s_0)/2 of the data, as if they
    began there."""
    objective = torch.stack([terms.reward(w) - terms.values(w) for w in data]).mean()
    if shared_start:
        objective = objective - torch.stack([w.v[0] / 2 for w in data]).mean()
    else:
        objective = objective - torch.stack([terms.values(w) for w in model]).mean()
    if rollout_penalty:
        objective = objective - rollout_penalty * torch.stack([terms.squared_residual(w) for w in model]).mean()
    return -objective * len(data) / sum(len(w.q) for w in data)
