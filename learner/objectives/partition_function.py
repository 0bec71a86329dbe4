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
        empty = torch.zeros(0, dtype=torch.int64)
        # seen: number of the last call of `add` with the context
        self._columns = {"z_context": empty, "z_total": empty.double(), "z_count": empty.double(), "z_seen": empty}

    def leave_one_out(self, context: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """Z of the context of each new rollout, and the mean of Z over all contexts, each [N].

        Both from what was added and the *other* new ones, 0 without any: neither depends on the rollout itself, so they
        may serve in its baseline without bias. With one context they are equal. Differentiable in `ratio`.
        """
        contexts, totals, counts, _ = self._merged(context, ratio).values()
        place = torch.searchsorted(contexts, context)
        pooled_count = counts.sum() - 1
        pooled = torch.where(pooled_count > 0, (totals.sum() - ratio) / pooled_count, 0.0).clamp(min=0)
        total, count = totals[place] - ratio, counts[place] - 1
        z = (total.clamp(min=0) + POOLED_ROLLOUTS * pooled) / (count + POOLED_ROLLOUTS)  # a rounding error is below 0
        return z, pooled

    def add(self, context: Tensor, ratio: Tensor) -> None:
        """Take note of [N] rollouts."""
        merged = self._merged(context, ratio)
        if len(merged["z_seen"]) > self._max_contexts:
            kept = merged["z_seen"].argsort(descending=True, stable=True)[: self._max_contexts].sort().values
            merged = {name: column[kept] for name, column in merged.items()}
        self._columns = merged

    def state(self) -> dict[str, Tensor]:
        """Everything."""
        return dict(self._columns)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state()`, which may hold other tensors too."""
        self._columns = {name: state[name] for name in self._columns}

    def _merged(self, context: Tensor, ratio: Tensor) -> dict[str, Tensor]:
        known, total, count, seen = self._columns.values()
        contexts, place = torch.unique(torch.cat([known, context]), return_inverse=True)
        zeros = torch.zeros(len(contexts), dtype=torch.float64)
        now = torch.full_like(context, int(seen.max()) + 1 if len(seen) else 0)
        return {
            "z_context": contexts,
            "z_total": zeros.index_add(0, place, torch.cat([total, ratio])),
            "z_count": zeros.index_add(0, place, torch.cat([count, torch.ones_like(ratio)])),
            "z_seen": torch.zeros_like(contexts).scatter_reduce(0, place, torch.cat([seen, now]), "amax"),
        }


def prompt_weights(z: Tensor, pooled: Tensor) -> Tensor:
    """[N] mean of Z over Z of the rollout's prompt: what its ratio P / mu counts; 1 where nothing is known of either.

    The numerator is the same for all prompts but for the rollout that is left out, so it scales the direction alone;
    with one prompt it is 1, and the direction is that of the methods without prompts.
    """
    known = (z > 0) & (pooled > 0)
    return torch.where(known, pooled / torch.where(known, z, 1.0), 1.0)
