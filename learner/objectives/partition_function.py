"""Running estimates of Z = E_mu[P(x) / mu(x)], one for each prompt (context)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

POOLED_ROLLOUTS = 1.0
"""The mean over all contexts counts in each as so many rollouts of its own: most prompts are seen a few times only."""


class PartitionFunction:
    """Means of the ratios P / mu that were added, by context; float64, in host memory."""

    def __init__(self) -> None:
        self._context = torch.zeros(0, dtype=torch.int64)
        self._total = torch.zeros(0, dtype=torch.float64)
        self._count = torch.zeros(0, dtype=torch.float64)

    @property
    def pooled(self) -> float:
        """Mean over everything that was added; 0 before."""
        count = float(self._count.sum())
        return float(self._total.sum()) / count if count else 0.0

    def leave_one_out(self, context: Tensor, ratio: Tensor) -> Tensor:
        """[N] Z of the context of each new rollout, from what was added and the *other* new ones; 0 without any.

        It does not depend on the rollout itself, so it may serve as its baseline without bias.
        """
        merged = self._merged(context, ratio)
        place = torch.searchsorted(merged._context, context)
        pooled_count = merged._count.sum() - 1
        pooled = torch.where(pooled_count > 0, (merged._total.sum() - ratio) / pooled_count, 0.0)
        total, count = merged._total[place] - ratio, merged._count[place] - 1
        return ((total + POOLED_ROLLOUTS * pooled) / (count + POOLED_ROLLOUTS)).clamp(min=0)  # a rounding error below

    def add(self, context: Tensor, ratio: Tensor) -> None:
        """Take note of [N] rollouts."""
        merged = self._merged(context, ratio)
        self._context, self._total, self._count = merged._context, merged._total, merged._count

    def state(self) -> dict[str, Tensor]:
        """Everything."""
        return {"z_context": self._context, "z_total": self._total, "z_count": self._count}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state()`."""
        self._context, self._total, self._count = state["z_context"], state["z_total"], state["z_count"]

    def _merged(self, context: Tensor, ratio: Tensor) -> PartitionFunction:
        merged = PartitionFunction()
        merged._context, place = torch.unique(torch.cat([self._context, context]), return_inverse=True)
        zeros = torch.zeros(len(merged._context), dtype=torch.float64)
        merged._total = zeros.index_add(0, place, torch.cat([self._total, ratio]))
        merged._count = zeros.index_add(0, place, torch.cat([self._count, torch.ones_like(ratio)]))
        return merged
