"""Where a seeded stream stands: the order of its epochs and the random numbers it has used, as counters."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from buffer.experts.ragged import Int64


class EpochOrder:
    """Row indexes of one epoch after the other, each epoch in an order of its own."""

    def __init__(self, num_examples: int, seed: tuple[int, ...]) -> None:
        if num_examples < 1:
            raise ValueError("a stream needs at least one example")
        self._num_examples = num_examples
        self._seed = seed
        self._start_epoch(epoch=0, position=0)

    @property
    def epoch(self) -> int:
        """Epoch of the next row."""
        return self._epoch

    def draw(self, count: int) -> Int64:
        """The next `count` row indexes; may run over the end of an epoch."""
        parts = []
        while count > 0:
            if self._position == self._num_examples:
                self._start_epoch(self._epoch + 1, position=0)
            part = self._order[self._position : self._position + count]
            self._position += len(part)
            count -= len(part)
            parts.append(part)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def state(self) -> dict[str, int]:
        """Counters for `load_state`."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Go to where `state` was taken.

        Raises:
            ValueError: the state is not of a stream over as many examples.
        """
        epoch, position = read_counters(state, ("epoch", "position"))
        if position > self._num_examples:
            raise ValueError(
                f"the stream's state is at row {position} of an epoch, but the task has "
                f"{self._num_examples} examples; resume with the task settings of the run"
            )
        self._start_epoch(epoch, position)

    def _start_epoch(self, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        self._order = np.random.default_rng([*self._seed, epoch]).permutation(self._num_examples)


class CountedUniforms:
    """A seeded generator of doubles that knows how many it has given, so that it can be put back there."""

    def __init__(self, seed: tuple[int, ...]) -> None:
        self._seed = seed
        self.load_count(0)

    def load_count(self, count: int) -> None:
        """Go to after the first `count` doubles."""
        self.rng = np.random.Generator(np.random.PCG64(self._seed).advance(count))
        self.count = count


def read_counters(state: Mapping[str, int], names: tuple[str, ...]) -> list[int]:
    """The named counters of a stream's state.

    Raises:
        ValueError: one is missing.
    """
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(f"the stream's state lacks {missing}; it has {sorted(state)}")
    return [state[name] for name in names]
