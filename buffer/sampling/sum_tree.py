"""A sum tree: draws in proportion to weights, and the n-th of what is there, in O(log n) per draw.

Leaves hold the weights; every node above holds the sum of its 32 children, so a million leaves are four levels. All
operations are vectorised over the leaves they touch. A sum is always computed anew from the children, never by adding
a difference, so it does not drift, and weights that are put back give the tree as it was, bit for bit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

_FANOUT = 32

_SPARE = 4
"""So many places, and a quarter, are drawn beyond those that are needed: mostly they make up for the repetitions."""


class SumTree:
    """Weights at places 0, 1, ...; new ones come at the end. A weight of 0 means that nothing is there."""

    def __init__(self) -> None:
        self._size = 0
        self._levels = _empty_levels(_FANOUT)  # leaves first; the last one is a single block of children of the root

    def __len__(self) -> int:
        """Leaves, also those of weight 0."""
        return self._size

    @property
    def weights(self) -> Float64:
        """[n] a view to read."""
        return self._levels[0][: self._size]

    @property
    def total(self) -> float:
        """Sum of all weights."""
        return float(self._levels[-1].sum())

    def append(self, weights: Float64) -> None:
        """Add leaves at the end; weights are finite and not negative."""
        begin, end = self._size, self._size + len(weights)
        if end > len(self._levels[0]):
            present = self.weights
            self._levels = _empty_levels(max(end, 2 * begin))
            self._levels[0][:begin] = present
            begin = 0
        self._levels[0][end - len(weights) : end] = weights
        self._size = end
        for below, above in zip(self._levels, self._levels[1:], strict=False):
            begin, end = begin // _FANOUT, -(-end // _FANOUT)
            above[begin:end] = below.reshape(-1, _FANOUT)[begin:end].sum(axis=1)

    def put(self, slots: Int64, weights: Float64 | float) -> None:
        """Replace the weights at these places, which are distinct."""
        self._levels[0][slots] = weights
        for below, above in zip(self._levels, self._levels[1:], strict=False):
            slots = np.unique(slots // _FANOUT)
            above[slots] = below.reshape(-1, _FANOUT)[slots].sum(axis=1)

    def keep(self, slots: Int64) -> None:
        """Keep the leaves at these places, in this order, and forget the others."""
        kept = self.weights[slots]
        self._size, self._levels = 0, _empty_levels(max(2 * len(kept), _FANOUT))
        self.append(kept)

    def find(self, targets: Float64) -> Int64:
        """[k] for each target in [0, total): the first place up to which the weights add up to more than the target.

        So a uniform target finds a place in proportion to its weight and, with weights of 1, the target n finds the
        n-th place that is taken, from 0. A place of weight 0 is never found, whatever the rounding.
        """
        nodes = np.zeros(len(targets), dtype=np.int64)
        each = np.arange(len(targets))
        for level in reversed(self._levels):
            sums = np.cumsum(level.reshape(-1, _FANOUT)[nodes], axis=1)
            # Rounding may have left a target beyond the sum of the block.
            targets = np.minimum(targets, np.nextafter(sums[:, -1], 0.0))
            child = (sums <= targets[:, None]).sum(axis=1)
            targets = targets - np.where(child > 0, sums[each, child - 1], 0.0)
            nodes = nodes * _FANOUT + child
        return nodes

    def sample(self, count: int, generator: np.random.Generator) -> Int64:
        """[count] distinct places in the order drawn: each draw in proportion to the weights not drawn yet.

        At least `count` weights are positive. Places are drawn independently and repetitions rejected, which is such a
        successive sampling; before each further round what was drawn is taken out, so that a few large weights do not
        make it reject for ever.
        """
        drawn = np.empty(0, dtype=np.int64)
        taken_out = drawn
        weights = self._levels[0]
        saved = np.empty(0, dtype=np.float64)
        while len(drawn) < count:
            if len(drawn):
                new = drawn[len(taken_out) :]
                saved = np.concatenate([saved, weights[new]])
                self.put(new, 0.0)
                taken_out = drawn
            missing = count - len(drawn)
            found = self.find(generator.random(missing + missing // 4 + _SPARE) * self.total)
            _, first = np.unique(found, return_index=True)
            drawn = np.concatenate([drawn, found[np.sort(first)]])[:count]
        if len(taken_out):
            self.put(taken_out, saved)
        return drawn


def _empty_levels(num_leaves: int) -> list[Float64]:
    """Levels of zeros for at least `num_leaves` leaves; each is as long as whole blocks are."""
    levels = [np.zeros(-(-num_leaves // _FANOUT) * _FANOUT)]
    while len(levels[-1]) > _FANOUT:
        num_blocks = len(levels[-1]) // _FANOUT
        levels.append(np.zeros(-(-num_blocks // _FANOUT) * _FANOUT))
    return levels
