"""Decides the number of rollout actors from observed waiting times; it does not start or end actors.

The buffer's limiter makes the learner wait for samples if there are too few actors, and throttles actors if there are
too many. Over a window in which all actors work, let

    w  fraction of the time in which a sample waits       the learner could run up to 1 / (1 - w) times as fast
    h  fraction of the actors' time in which they are     (1 - h) of each actor is in use
       throttled

If w is at least `grow_above`, the pool of n actors grows to n / (1 - w), at most to twice its size. Otherwise it
shrinks to n (1 - h) / (1 - headroom). The pool does not oscillate: after it shrank, it is still
larger than the part in use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from actors.pool.controller import PoolStatus
from actors.rollout_actor import PAUSED, STARTING, THROTTLED, WAITING_FOR_WEIGHTS
from actors.settings import AutoscaleSettings

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Observation:
    """The run at one moment.

    desired: target number of actors. working: actors that are throttled or generate; the others start, leave, or have
        no work in this stage. sample_waits: whether the learner waits for rollouts. throttled: actors that the limiter
        pauses.
    """

    now_s: float
    desired: int
    working: int
    throttled: int
    sample_waits: bool

    @classmethod
    def of(cls, now_s: float, pool: PoolStatus, sample_waits: bool) -> Observation:
        """From the status of a pool. now_s: on a monotonic clock."""
        running = [member.status for member in pool.members if member.state == "running" and member.status is not None]
        activities = [status.activity for status in running]
        return cls(
            now_s=now_s,
            desired=pool.desired,
            working=sum(activity not in (STARTING, WAITING_FOR_WEIGHTS, PAUSED) for activity in activities),
            throttled=sum(activity == THROTTLED for activity in activities),
            sample_waits=sample_waits,
        )


class Autoscaler:
    """Observes the run for one window, then decides; keeps nothing from one window to the next."""

    def __init__(self, settings: AutoscaleSettings) -> None:
        self._settings = settings
        self._last: Observation | None = None
        self._window_s = self._waited_s = self._throttled_s = 0.0

    def observe(self, seen: Observation) -> int | None:
        """The new number of actors; None = no change. The state in `seen` is assumed to last until the next call."""
        last, self._last = self._last, seen
        if seen.working != seen.desired or last is None or last.desired != seen.desired:
            self._forget()  # actors come or go, or the stage has no rollouts
            return None
        elapsed_s = seen.now_s - last.now_s
        self._window_s += elapsed_s
        self._waited_s += elapsed_s * last.sample_waits
        self._throttled_s += elapsed_s * last.throttled / max(last.working, 1)
        if self._window_s < self._settings.window_s:
            return None
        wanted = self._wanted(seen.desired, self._waited_s / self._window_s, self._throttled_s / self._window_s)
        self._forget()
        return None if wanted == seen.desired else wanted

    def _wanted(self, count: int, waited: float, throttled: float) -> int:
        settings = self._settings
        if waited >= settings.grow_above:
            wanted = min(math.ceil(count / max(1.0 - waited, _ROUNDING) - _ROUNDING), 2 * count)
        else:
            wanted = min(math.ceil(count * (1.0 - throttled) / (1.0 - settings.headroom) - _ROUNDING), count)
        return min(max(wanted, settings.min), settings.max)

    def _forget(self) -> None:
        self._window_s = self._waited_s = self._throttled_s = 0.0
