"""Running estimates of Z_c = E_mu[P(x) / mu(x)], one for each prompt (context) c.

A policy cannot change its prompts, so its target is p_c = P / Z_c for each of them, and what a rollout counts is
P / (mu Z_c) (conditional DPG: Korbak et al. 2021, arXiv 2112.00791). P is fixed, so Z_c is the same number for every mu
and at every step, and all rollouts of a prompt count alike, however old: a mean, not a moving average.

Most prompts are seen a few times only, or once. So the mean over all of them counts in each as one rollout of its own:
with n rollouts of a prompt,

    Z_c = (sum of its ratios + mean ratio of all prompts) / (n + 1).

It is biased towards that mean, by a share 1 / (n + 1) of the difference; a prompt that was never seen before has the
mean itself. For a rollout x both leave x itself out, so that neither depends on it: divided by Z_c, the direction of
each prompt's own target stays unbiased, and only the weight of the prompt among the others is biased, by the above and
by E[1 / Z_c] > 1 / E[Z_c], of the order of the variance of the ratios over n Z_c^2.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

POOLED_ROLLOUTS = 1.0
"""The mean over all contexts counts in each as so many rollouts of its own."""

MAX_CONTEXTS = 2**17
"""Contexts that are remembered, at most (4 MiB); beyond, those go that were not added to for the longest time."""


class PartitionFunction:
    """Means of the ratios P / mu that were added, by context; float64, in host memory."""

    def __init__(self, max_contexts: int = MAX_CONTEXTS) -> None:
        self._max_contexts = max_contexts
        self._context = torch.zeros(0, dtype=torch.int64)
        self._total = torch.zeros(0, dtype=torch.float64)
        self._count = torch.zeros(0, dtype=torch.float64)
        self._seen = torch.zeros(0, dtype=torch.int64)  # number of the last call of `add` with the context

    def leave_one_out(self, context: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """Z of the context of each new rollout, and the mean of Z over all contexts, each [N].

        Both from what was added and the *other* new ones, 0 without any: neither depends on the rollout itself, so they
        may serve in its baseline without bias. With one context they are equal. Differentiable in `ratio`.
        """
        merged = self._merged(context, ratio)
        place = torch.searchsorted(merged._context, context)
        pooled_count = merged._count.sum() - 1
        pooled = torch.where(pooled_count > 0, (merged._total.sum() - ratio) / pooled_count, 0.0).clamp(min=0)
        total, count = merged._total[place] - ratio, merged._count[place] - 1
        z = (total.clamp(min=0) + POOLED_ROLLOUTS * pooled) / (count + POOLED_ROLLOUTS)  # a rounding error is below 0
        return z, pooled

    def add(self, context: Tensor, ratio: Tensor) -> None:
        """Take note of [N] rollouts."""
        merged = self._merged(context, ratio)
        kept = torch.arange(len(merged._context))
        if len(kept) > self._max_contexts:
            kept = merged._seen.argsort(descending=True, stable=True)[: self._max_contexts].sort().values
        self._context, self._seen = merged._context[kept], merged._seen[kept]
        self._total, self._count = merged._total[kept], merged._count[kept]

    def state(self) -> dict[str, Tensor]:
        """Everything."""
        return {"z_context": self._context, "z_total": self._total, "z_count": self._count, "z_seen": self._seen}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state()`."""
        self._context, self._seen = state["z_context"], state["z_seen"]
        self._total, self._count = state["z_total"], state["z_count"]

    def _merged(self, context: Tensor, ratio: Tensor) -> PartitionFunction:
        merged = PartitionFunction()
        merged._context, place = torch.unique(torch.cat([self._context, context]), return_inverse=True)
        zeros = torch.zeros(len(merged._context), dtype=torch.float64)
        merged._total = zeros.index_add(0, place, torch.cat([self._total, ratio]))
        merged._count = zeros.index_add(0, place, torch.cat([self._count, torch.ones_like(ratio)]))
        now = torch.full_like(context, int(self._seen.max()) + 1 if len(self._seen) else 0)
        merged._seen = torch.zeros_like(merged._context).scatter_reduce(0, place, torch.cat([self._seen, now]), "amax")
        return merged


def prompt_weights(z: Tensor, pooled: Tensor) -> Tensor:
    """[N] mean of Z over Z of the rollout's prompt: what its ratio P / mu counts; 1 where nothing is known of either.

    The numerator is the same for all prompts but for the rollout that is left out, so it scales the direction alone;
    with one prompt it is 1, and the direction is that of the methods without prompts.
    """
    known = (z > 0) & (pooled > 0)
    return torch.where(known, pooled / torch.where(known, z, 1.0), 1.0)
