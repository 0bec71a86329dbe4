"""Which live rows a draw takes: positions in [0, num_live), oldest row first, without repetition in one draw."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from buffer.settings import BufferSettings

Int64 = npt.NDArray[np.int64]


class Sampler(Protocol):
    """Chooses rows of a draw."""

    def sample(self, num_live: int, count: int, generator: np.random.Generator) -> Int64:
        """[count] distinct positions in [0, num_live), position 0 being the oldest live row; count <= num_live."""


class UniformSampler:
    """Every set of `count` rows is equally likely."""

    def sample(self, num_live: int, count: int, generator: np.random.Generator) -> Int64:
        """[count] distinct positions."""
        return generator.choice(num_live, size=count, replace=False)


class RecencySampler:
    """Successive draws without replacement in which the k-th newest row (k = 1, 2, ...) has weight
    k^-exponent.

    The `count` largest of log(weight) + Gumbel noise are such a draw (Efraimidis and Spirakis 2006; Gumbel
    top-k).
    """

    def __init__(self, exponent: float) -> None:
        if exponent < 0.0:
            raise ValueError(f"recency exponent {exponent} is negative: older rows would be preferred")
        self._exponent = exponent

    def sample(self, num_live: int, count: int, generator: np.random.Generator) -> Int64:
        """[count] distinct positions, in the order in which they were drawn."""
        if count == 0:
            return np.empty(0, dtype=np.int64)
        rank = np.arange(num_live, 0, -1)
        keys = generator.gumbel(size=num_live) - self._exponent * np.log(rank)
        largest = np.argpartition(keys, num_live - count)[num_live - count :]
        return largest[np.argsort(-keys[largest])].astype(np.int64)


def make_sampler(settings: BufferSettings) -> Sampler:
    """The sampler that `settings` names."""
    if settings.sampler == "recency":
        return RecencySampler(1.0 if settings.recency_exponent is None else settings.recency_exponent)
    return UniformSampler()
