"""The samplers: each chooses distinct rows among all live rows.

The choice depends on the live rows and the generator alone, so a store that was closed and opened again chooses the
same rows. Weighted sampling without replacement takes the rows with the largest log(weight) + Gumbel noise (Efraimidis
and Spirakis 2006; Kool et al. 2019, section 2.3).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import xxhash

from buffer.custom import make_custom
from buffer.settings import BufferSettings, CustomSettings
from buffer.store.table import Float32
from buffer.trajectory.staleness import Int32, Int64

Float64 = npt.NDArray[np.float64]

SMALLEST_PRIORITY = 1e-6
"""A lower priority counts as this one, so that every live row can be sampled."""

_BITS = np.random.PCG64(0)
_GENERATOR = np.random.Generator(_BITS)

DEFAULT_RECENCY_EXPONENT = 1.0
DEFAULT_PRIORITY_EXPONENT = 0.6

Column = Literal["created_us", "oldest_version", "times_sampled", "reward", "task", "priority"]
"""The values of live rows that a sampler may read. created_us: microseconds since the epoch; oldest_version: of the
policies that acted, -1 of an expert; reward: nan where there is none; task: a code, equal ones mean the same task;
priority: set only with sampler=prioritized.
"""
ReadColumn = Callable[[Column], npt.NDArray[Any]]
"""Gives [n] values, one for each live row, the oldest row first; read-only."""
Choose = Callable[[int, int, np.random.Generator, ReadColumn], Int64]
"""See `Sampler.choose`."""


@runtime_checkable
class Sampler(Protocol):
    """Interface of a custom sampler; each shard makes one instance."""

    def choose(self, num_rows: int, count: int, generator: np.random.Generator, column: ReadColumn) -> Int64:
        """[count] distinct places among `num_rows` live rows of one source, the oldest row first; count <= num_rows.

        The choice has to follow from the arguments alone: with random numbers of `generator`, the same seed gives the
        same run.
        """


def sample_generator(seed: int, stage: str, step: int, source: str, num_sampled: int) -> np.random.Generator:
    """Random generator for the rows of a sample after the first `num_sampled`; the same in any process. The next call
    resets it.

    The name is hashed (XXH3) to the 128 bits of a PCG64 state and 128 bits of its increment, which takes a quarter of
    the time of numpy's `SeedSequence`.
    """
    name = f"{seed} {step} {source} {num_sampled} {stage}".encode()
    _BITS.state = {
        "bit_generator": "PCG64",
        "state": {"state": xxhash.xxh3_128_intdigest(name), "inc": xxhash.xxh3_128_intdigest(name, seed=1) | 1},
        "has_uint32": 0,
        "uinteger": 0,
    }
    return _GENERATOR


def uniform(num_rows: int, count: int, generator: np.random.Generator) -> Int64:
    """[count] places of `num_rows`; every set of them is equally likely."""
    return generator.choice(num_rows, count, replace=False)


def by_recency(num_rows: int, count: int, exponent: float, generator: np.random.Generator) -> Int64:
    """[count] places, the newest row last; the k-th newest (k = 1, 2, ...) has weight k^-exponent."""
    return _successive(-exponent * np.log(np.arange(num_rows, 0, -1)), count, generator)


def by_priority(priorities: Float32, count: int, exponent: float, generator: np.random.Generator) -> Int64:
    """[count] places, in proportion to priority^exponent, as in Schaul et al. 2016 (arXiv 1511.05952), section 3.3."""
    floored = np.maximum(priorities.astype(np.float64), SMALLEST_PRIORITY)
    return _successive(exponent * np.log(floored), count, generator)


def by_task(tasks: Int32, count: int, generator: np.random.Generator) -> Int64:
    """[count] places: the same number of rows of every task, uniformly within a task.

    What cannot be divided evenly goes to tasks that the generator chooses. A task with fewer rows than its share gives
    all of them, and the others share what is left. tasks: [n] codes; equal ones mean the same task.
    """
    _, firsts, strata = np.unique(tasks, return_index=True, return_inverse=True)
    strata = np.argsort(np.argsort(firsts))[strata]  # by the oldest row of each, since the codes depend on history
    sizes = np.bincount(strata)
    order = generator.permutation(len(tasks))
    by_stratum = order[np.argsort(strata[order], kind="stable")]
    ranks = np.empty(len(tasks), np.int64)  # of each row within its task
    ranks[by_stratum] = np.arange(len(tasks)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    precedence = generator.permutation(len(sizes))[strata]
    chosen: Int64 = np.lexsort((precedence, ranks))[:count]
    return chosen


def choose(
    settings: BufferSettings,
    num_rows: int,
    count: int,
    generator: np.random.Generator,
    column: ReadColumn,
) -> Int64:
    """[count] places of `num_rows` live rows, the oldest row first, as a named `buffer.sampler` says. column: gives a
    value per row, where the sampler goes by it."""
    match settings.sampler:
        case "uniform":
            return uniform(num_rows, count, generator)
        case "fifo":
            return np.arange(count)
        case "recency":
            exponent = settings.recency_exponent
            return by_recency(num_rows, count, DEFAULT_RECENCY_EXPONENT if exponent is None else exponent, generator)
        case "prioritized":
            exponent = settings.priority_exponent
            return by_priority(
                column("priority"), count, DEFAULT_PRIORITY_EXPONENT if exponent is None else exponent, generator
            )
        case "stratified":
            return by_task(column("task"), count, generator)
    raise AssertionError(f"{settings.sampler} is no name of a sampler")


def make_sampler(settings: BufferSettings) -> Choose:
    """The sampler that `buffer.sampler` names. ValueError: see `buffer.custom.make_custom`."""
    if not isinstance(settings.sampler, CustomSettings):
        return partial(choose, settings)
    path, sampler = settings.sampler.path, make_custom(settings.sampler, Sampler)  # type: ignore[type-abstract]

    def choose_checked(num_rows: int, count: int, generator: np.random.Generator, column: ReadColumn) -> Int64:
        places = np.asarray(sampler.choose(num_rows, count, generator, column))
        distinct = np.unique(places)
        is_chosen = places.shape == (count,) and places.dtype.kind == "i" and len(distinct) == count
        if not is_chosen or distinct[0] < 0 or distinct[-1] >= num_rows:
            given = np.array2string(places, threshold=8)
            raise ValueError(
                f"{path} has to choose {count} distinct integers from 0 to {num_rows - 1}: it gave {given}"
            )
        return places.astype(np.int64)

    return choose_checked


def _successive(log_weights: Float64, count: int, generator: np.random.Generator) -> Int64:
    """[count] places in the order of successive samples without replacement."""
    keys = log_weights + generator.gumbel(size=len(log_weights))
    best = np.argpartition(-keys, count - 1)[:count]
    return best[np.argsort(-keys[best])]
