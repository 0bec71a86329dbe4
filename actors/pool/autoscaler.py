"""How many rollout actors a run wants, by who waits for whom: decisions only, taken from what is seen of the run.

The limiter of the buffer makes the slower side felt: a draw of the learner waits where actors are too few, actors are
throttled where they are too many. Over a window in which all actors work, let

    w  share of the time in which a draw waits        the learner could go up to 1 / (1 - w) times as fast
    h  share of the actors' time in which they are    (1 - h) of each actor is in use
       throttled

With w of `grow_above` or more the pool of n actors grows to n / (1 - w), at most to twice its size. Else, what is in
use and the headroom asked for tell how many are enough: n (1 - h) / (1 - headroom), and the others leave. The two do
not answer each other: a pool that shrank is still larger than what was in use.
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

    desired: actors that there should be. working: those that are throttled or generate; the others start, leave, or
        have no work in this stage. sample_waits: of the learner, for rollouts. throttled: actors that the limiter
        stops.
    """

    now_s: float
    desired: int
    working: int
    throttled: int
    sample_waits: bool

    @classmethod
    def of(cls, now_s: float, pool: PoolStatus, sample_waits: bool) -> Observation:
        """What a pool's status says. now_s: on any clock that does not go back."""
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
    """Looks at the run for a window, decides, and looks again; keeps nothing from one window to the next."""

    def __init__(self, settings: AutoscaleSettings) -> None:
        self._settings = settings
        self._last: Observation | None = None
        self._window_s = self._waited_s = self._throttled_s = 0.0

    def observe(self, seen: Observation) -> int | None:
        """The number of actors from now on; None = as it is. What is seen counts until the next call."""
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
