"""How far draws and inserts of policy trajectories may run from a ratio, after the rate limiter of Reverb (Cassirer et
al. 2021, arXiv 2102.04736, section 3.4).

With `spi` samples per insert, every inserted row offers spi draws. The offers that were not taken,

    balance = spi * inserted - drawn,

stay within `tolerance` of spi * min_size: a draw that would take the balance below waits for inserts, and actors pause
before an insert takes it above. Both are told by counts since the folder exists, so a restart changes nothing.

Neither can wait for the other as long as a draw and an insert together fit between the bounds, which `check` asks for.
What left the buffer unused is no offer any longer: where the live rows offer less than the balance, actors go on.

Without a ratio draws never wait, and actors pause when, one draw per insert, the bound above is reached.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

from buffer.settings import BufferSettings

if TYPE_CHECKING:
    from buffer.store.shard import SourceCounters

_ROUNDING = 1e-9
"""In draws: the ratio need not be a binary fraction."""


class Limiter:
    """Says who has to wait. It keeps no state: what it goes by are the counters of the store, of policy rows."""

    def __init__(self, settings: BufferSettings) -> None:
        self._settings = settings
        self._ratio = 1.0 if settings.samples_per_insert is None else settings.samples_per_insert
        offset = self._ratio * settings.min_size
        self._low = offset - settings.tolerance
        self._high = offset + settings.tolerance

    def allowance(self, policy: SourceCounters) -> int:
        """Rows that may be drawn now; `sys.maxsize` without a ratio."""
        if self._settings.samples_per_insert is None:
            return sys.maxsize
        return max(math.floor(self._ratio * policy.inserted - policy.sampled - self._low + _ROUNDING), 0)

    def inserts_needed(self, count: int, policy: SourceCounters) -> int:
        """How many more rows have to come before `count` rows may be drawn."""
        if self.allowance(policy) >= count:
            return 0
        return math.ceil((self._low + policy.sampled + count - _ROUNDING) / self._ratio) - policy.inserted

    def wants_inserts(self, policy: SourceCounters) -> bool:
        """Whether one more row is welcome; if not, actors are to pause (unless a draw waits)."""
        offered = min(self._ratio * policy.inserted - policy.sampled, self._ratio * policy.live)
        return offered + self._ratio <= self._high + _ROUNDING

    def check(self, count: int) -> None:
        """ValueError where the bounds leave no place for a draw of `count` rows and an insert into each shard, which
        has its share of the tolerance."""
        if self._settings.samples_per_insert is None:
            return
        smallest = (count + self._settings.shards * self._ratio) / 2
        if self._settings.tolerance < smallest:
            raise ValueError(
                f"a draw of {count} policy trajectories does not fit between the bounds of buffer.samples_per_insert="
                f"{self._ratio:g}: draws and inserts would wait for each other within a tolerance of "
                f"{self._settings.tolerance:g} draws. Set buffer.samples_per_insert_tolerance to {smallest:g} or more, "
                "or draw fewer at a time (rollout_batch_size)"
            )
