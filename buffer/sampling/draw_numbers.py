"""The random numbers of draws: each draw has its own, so none has to be repeated for another."""

from __future__ import annotations

import numpy as np
import xxhash


class DrawNumbers:
    """Generators by the names of draws. Same seed and name: same numbers, in any process. Not thread-safe.

    A name becomes the 128 bits of a PCG64 state, and as many of its increment, by hashing (XXH3), which takes a quarter
    of the time that numpy's `SeedSequence` does.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._bits = np.random.PCG64()
        self._generator = np.random.Generator(self._bits)

    def of(self, stage: str, step: int, source: str, num_logged: int) -> np.random.Generator:
        """At the beginning of the numbers of a draw that gave `num_logged` rows before; good until the next call."""
        name = f"{self._seed} {step} {source} {num_logged} {stage}".encode()
        self._bits.state = {
            "bit_generator": "PCG64",
            "state": {"state": xxhash.xxh3_128_intdigest(name), "inc": xxhash.xxh3_128_intdigest(name, seed=1) | 1},
            "has_uint32": 0,
            "uinteger": 0,
        }
        return self._generator
