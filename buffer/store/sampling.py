"""Which live rows a draw takes: distinct ones, by a law that looks at all of them.

What is chosen follows from the live rows and the generator alone, not from how they came about: a store that was opened
again draws what the first one would have drawn. Successive draws without replacement, each in proportion to a weight,
are the rows with the largest log(weight) + Gumbel noise (Efraimidis and Spirakis 2006; Kool et al. 2019, section 2.3).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import xxhash

from buffer.settings import BufferSettings
from buffer.store.table import Float32
from buffer.trajectory.staleness import Int32, Int64

Float64 = npt.NDArray[np.float64]

SMALLEST_PRIORITY = 1e-6
"""A lower priority counts as this one, so that every live row can be drawn."""

_BITS = np.random.PCG64(0)
_GENERATOR = np.random.Generator(_BITS)

DEFAULT_RECENCY_EXPONENT = 1.0
DEFAULT_PRIORITY_EXPONENT = 0.6


def sample_generator(seed: int, stage: str, step: int, source: str, num_sampled: int) -> np.random.Generator:
    """The random numbers of a draw that gave `num_sampled` rows before: the same in any process. Good until the next
    call.

    The name becomes the 128 bits of a PCG64 state, and as many of its increment, by hashing (XXH3), which takes a
    quarter of the time that numpy's `SeedSequence` takes.
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
    priorities: Callable[[], Float32],
    tasks: Callable[[], Int32],
) -> Int64:
    """[count] places of `num_rows` live rows, the oldest row first, as `buffer.sampler` says. priorities, tasks: give
    [n] of each row, where the sampler goes by them."""
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
                priorities(), count, DEFAULT_PRIORITY_EXPONENT if exponent is None else exponent, generator
            )
        case "stratified":
            return by_task(tasks(), count, generator)


def _successive(log_weights: Float64, count: int, generator: np.random.Generator) -> Int64:
    """[count] places in the order of successive draws without replacement."""
    keys = log_weights + generator.gumbel(size=len(log_weights))
    best = np.argpartition(-keys, count - 1)[:count]
    return best[np.argsort(-keys[best])]
