"""Keeps the ratio of samples to inserts of policy trajectories, after the rate limiter of Reverb (Cassirer et al. 2021,
arXiv 2102.04736, section 3.4).

With `spi` samples per insert, the unused samples of the inserted rows,

    balance = spi * inserted - sampled,

stay within `tolerance` of spi * min_size. A sample that would take the balance below the lower bound waits for inserts.
Actors pause before an insert takes it above the upper bound. Both numbers count from the creation of the folder, so a
restart changes nothing.

`check` requires bounds that a sample and an insert fit between together, so that neither waits for the other. A row
that left the buffer unused no longer counts: where spi * live is less than the balance, actors continue.

Without a ratio samples never wait. Actors pause at the upper bound that one sample per insert would have.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

from buffer.settings import BufferSettings

if TYPE_CHECKING:
    from buffer.store.shard import SourceCounters

_ROUNDING = 1e-9
"""In samples; a ratio such as 0.1 has no exact float."""


class Limiter:
    """Says who must wait. It has no state: it reads the store's counters of policy rows."""

    def __init__(self, settings: BufferSettings) -> None:
        self._settings = settings
        self._ratio = 1.0 if settings.samples_per_insert is None else settings.samples_per_insert
        offset = self._ratio * settings.min_size
        self._low = offset - settings.tolerance
        self._high = offset + settings.tolerance

    def allowance(self, policy: SourceCounters) -> int:
        """Rows that may be sampled now; `sys.maxsize` without a ratio."""
        if self._settings.samples_per_insert is None:
            return sys.maxsize
        return max(math.floor(self._ratio * policy.inserted - policy.sampled - self._low + _ROUNDING), 0)

    def inserts_needed(self, count: int, policy: SourceCounters) -> int:
        """How many rows must be inserted before `count` rows may be sampled."""
        if self.allowance(policy) >= count:
            return 0
        return math.ceil((self._low + policy.sampled + count - _ROUNDING) / self._ratio) - policy.inserted

    def wants_inserts(self, policy: SourceCounters) -> bool:
        """Whether one more row may be inserted; if not, actors pause (unless a sample waits)."""
        offered = min(self._ratio * policy.inserted - policy.sampled, self._ratio * policy.live)
        return offered + self._ratio <= self._high + _ROUNDING

    def check(self, count: int) -> None:
        """ValueError where a sample of `count` rows and an insert into each shard do not fit between the bounds; each
        shard has an equal fraction of the tolerance."""
        if self._settings.samples_per_insert is None:
            return
        smallest = (count + self._settings.shards * self._ratio) / 2
        if self._settings.tolerance < smallest:
            raise ValueError(
                f"a sample of {count} policy trajectories does not fit between the bounds of buffer.samples_per_insert="
                f"{self._ratio:g}: samples and inserts would wait for each other within a tolerance of "
                f"{self._settings.tolerance:g} samples. Set buffer.samples_per_insert_tolerance to {smallest:g} or "
                "more, or a smaller rollout_batch_size"
            )
