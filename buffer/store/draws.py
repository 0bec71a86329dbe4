"""The draws that may be repeated: a learner that goes on from a checkpoint is given the same rows again.

Rows of these draws are pinned: they may cease to be live, but their bytes are kept. Versions go on over a restart:
weights that are published again on the way get new numbers, and a draw is repeated without a look at staleness, since
its rows were fresh when they were first drawn. New draws count staleness from the new numbers. They exceed the old ones
by the publications that a restart adds or repeats, so a bound on staleness is then kept more strictly, never less.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from buffer.store.results import DrawKey
from buffer.store.table import NO_ROWS

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class NotedDraw:
    """What this shard gave to a draw: row numbers, in order. policy_version: newest version known then; whole: rows of
    the draw over all shards."""

    rows: Int64
    policy_version: int
    whole: int


class RepeatableDraws:
    """Draws that no checkpoint covers yet."""

    def __init__(self) -> None:
        self._draws: dict[DrawKey, NotedDraw] = {}
        self._pinned: Int64 | None = None  # computed when it is asked for

    def __iter__(self) -> Iterator[tuple[DrawKey, NotedDraw]]:
        return iter(list(self._draws.items()))

    def find(self, key: DrawKey) -> NotedDraw | None:
        """The draw with this key, None where there is none."""
        return self._draws.get(key)

    def add(self, key: DrawKey, draw: NotedDraw) -> NotedDraw:
        """A draw, or more rows of one that an interruption left incomplete; gives all of it."""
        if (before := self._draws.get(key)) is not None:
            draw = NotedDraw(np.concatenate([before.rows, draw.rows]), draw.policy_version, draw.whole)
        self._draws[key] = draw
        self._pinned = None
        return draw

    def forget(self, key: DrawKey) -> None:
        """This draw is not repeated."""
        self._draws.pop(key, None)
        self._pinned = None

    def release(self, stage: str, step: int) -> None:
        """A checkpoint of `stage` after `step` steps covers the stage's draws before, and all of other stages: stages
        follow one another, so none of those goes on."""
        self._draws = {key: draw for key, draw in self._draws.items() if key.stage == stage and key.step >= step}
        self._pinned = None

    @property
    def pinned_rows(self) -> Int64:
        """[n] rows whose bytes must be kept, ascending, without repetition."""
        if self._pinned is None:
            self._pinned = np.unique(np.concatenate([NO_ROWS, *(draw.rows for draw in self._draws.values())]))
        return self._pinned
