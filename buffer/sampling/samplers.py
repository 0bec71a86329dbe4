"""Which live rows a draw takes. Every sampler draws distinct rows, at a cost that hardly grows with the live rows.

Tasks are codes: equal codes mean the same task. What a sampler gives follows from the live rows and the generator
alone, not from how they came about; so a buffer that was restored draws what the first one would have. (Priorities are
summed in another order then, so a draw may differ where a random number meets a boundary up to rounding, about once in
10^12 draws.)
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from buffer.sampling.ranked_rows import RankedRows
from buffer.sampling.row_facts import Int32, Int64
from buffer.sampling.sum_tree import Float64, SumTree
from buffer.sampling.weighted_rows import WeightedRows
from buffer.settings import BufferSettings

Float32 = npt.NDArray[np.float32]

SMALLEST_PRIORITY = 1e-6
"""A lower priority counts as this one, so that every live row can be drawn."""


class Sampler(Protocol):
    """Chooses rows by their numbers."""

    def insert(self, rows: Int64, tasks: Int32, priorities: Float32) -> None:
        """Rows become live. rows: ascending, above all before."""

    def remove(self, rows: Int64, tasks: Int32) -> None:
        """Live rows are no longer so."""

    def update(self, rows: Int64, priorities: Float32) -> None:
        """Live rows get other priorities; rows: distinct."""

    def sample(self, count: int, generator: np.random.Generator) -> Int64:
        """[count] distinct live rows; there are as many."""


class _RankedSampler:
    """What samplers that go by the order of the rows share: priorities count for nothing."""

    def __init__(self) -> None:
        self._rows = RankedRows()

    def insert(self, rows: Int64, tasks: Int32, priorities: Float32) -> None:
        self._rows.append(rows)

    def remove(self, rows: Int64, tasks: Int32) -> None:
        self._rows.remove(rows)

    def update(self, rows: Int64, priorities: Float32) -> None:
        pass


class UniformSampler(_RankedSampler):
    """Every set of `count` rows is equally likely."""

    def sample(self, count: int, generator: np.random.Generator) -> Int64:
        """[count] distinct rows."""
        return self._rows.at_ranks(generator.choice(len(self._rows), size=count, replace=False))


class FifoSampler(_RankedSampler):
    """The oldest rows, in their order: with `max_times_sampled=1` the buffer is a queue."""

    def sample(self, count: int, generator: np.random.Generator) -> Int64:
        """[count] the oldest rows; nothing is random."""
        return self._rows.at_ranks(np.arange(count))


class RecencySampler(_RankedSampler):
    """Successive draws without replacement in which the k-th newest row (k = 1, 2, ...) has weight k^-exponent.

    The weights belong to the ranks, not to the rows: a sum tree over the ranks is drawn from, and only grows and
    shrinks at its end.
    """

    def __init__(self, exponent: float) -> None:
        super().__init__()
        self._exponent = exponent
        self._ranks = SumTree()
        self._num_ranks = 0

    def sample(self, count: int, generator: np.random.Generator) -> Int64:
        """[count] distinct rows, in the order in which they were drawn."""
        self._resize(len(self._rows))
        newest_first = self._ranks.sample(count, generator)
        return self._rows.at_ranks(self._num_ranks - 1 - newest_first)

    def _resize(self, num_ranks: int) -> None:
        """Give weights to the first `num_ranks` places and to no others."""
        if num_ranks < self._num_ranks:
            self._ranks.put(np.arange(num_ranks, self._num_ranks), 0.0)
        else:
            weights = np.arange(self._num_ranks + 1, num_ranks + 1, dtype=np.float64) ** -self._exponent
            present = min(len(self._ranks), num_ranks) - self._num_ranks  # places that exist, at weight 0
            self._ranks.put(np.arange(self._num_ranks, self._num_ranks + present), weights[:present])
            self._ranks.append(weights[present:])
        self._num_ranks = num_ranks


class PrioritisedSampler:
    """Successive draws without replacement, each in proportion to priority^exponent.

    Proportional prioritisation from a sum tree, as in Schaul et al. 2016 (arXiv 1511.05952), section 3.3.
    """

    def __init__(self, exponent: float) -> None:
        self._exponent = exponent
        self._rows = WeightedRows()

    def insert(self, rows: Int64, tasks: Int32, priorities: Float32) -> None:
        """See the protocol."""
        self._rows.append(rows, self._weights(priorities))

    def remove(self, rows: Int64, tasks: Int32) -> None:
        """See the protocol."""
        self._rows.remove(rows)

    def update(self, rows: Int64, priorities: Float32) -> None:
        """See the protocol."""
        self._rows.put(rows, self._weights(priorities))

    def sample(self, count: int, generator: np.random.Generator) -> Int64:
        """[count] distinct rows, in the order in which they were drawn."""
        return self._rows.sample(count, generator)

    def _weights(self, priorities: Float32) -> Float64:
        weights: Float64 = np.maximum(priorities.astype(np.float64), SMALLEST_PRIORITY) ** self._exponent
        return weights


class StratifiedSampler:
    """The same number of rows of every task that is present, uniformly within a task.

    What cannot be divided evenly goes to tasks that the generator chooses. A task with fewer rows than its share
    gives all of them, and the others share what is left.
    """

    def __init__(self) -> None:
        self._tasks: dict[int, RankedRows] = {}

    def insert(self, rows: Int64, tasks: Int32, priorities: Float32) -> None:
        """See the protocol."""
        for task in np.unique(tasks).tolist():
            self._tasks.setdefault(task, RankedRows()).append(rows[tasks == task])

    def remove(self, rows: Int64, tasks: Int32) -> None:
        """See the protocol."""
        for task in np.unique(tasks).tolist():
            self._tasks[task].remove(rows[tasks == task])
            if not len(self._tasks[task]):
                del self._tasks[task]

    def update(self, rows: Int64, priorities: Float32) -> None:
        """Priorities count for nothing."""

    def sample(self, count: int, generator: np.random.Generator) -> Int64:
        """[count] distinct rows, task by task."""
        # In an order that depends on the rows alone, since the codes depend on history.
        present = sorted(self._tasks.values(), key=lambda rows: rows.oldest)
        shares = _equal_shares(np.array([len(rows) for rows in present]), count, generator)
        return np.concatenate(
            [
                rows.at_ranks(generator.choice(len(rows), size=share, replace=False))
                for rows, share in zip(present, shares.tolist(), strict=True)
                if share
            ]
        )


def _equal_shares(sizes: Int64, count: int, generator: np.random.Generator) -> Int64:
    """[t] parts of `count`, as equal as parts of at most `sizes` can be; single ones left over go to random tasks."""
    shares = np.zeros_like(sizes)
    order = generator.permutation(len(sizes))
    while left := count - int(shares.sum()):
        unfilled = order[shares[order] < sizes[order]]
        each = left // len(unfilled)
        if each == 0:
            shares[unfilled[:left]] += 1
        else:
            shares[unfilled] = np.minimum(shares[unfilled] + each, sizes[unfilled])
    return shares


def make_sampler(settings: BufferSettings) -> Sampler:
    """An empty sampler of the kind that `settings` name."""
    match settings.sampler:
        case "uniform":
            return UniformSampler()
        case "fifo":
            return FifoSampler()
        case "recency":
            return RecencySampler(1.0 if settings.recency_exponent is None else settings.recency_exponent)
        case "prioritised":
            return PrioritisedSampler(0.6 if settings.priority_exponent is None else settings.priority_exponent)
        case "stratified":
            return StratifiedSampler()
