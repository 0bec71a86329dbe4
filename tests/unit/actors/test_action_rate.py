"""Actions per second: over a window, and from several threads."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

from actors import rollout_actor
from actors.rollout_actor import ActionRate

TraceFunction = Callable[[FrameType, str, object], object]


def test_the_mean_is_over_the_window_and_falls_to_zero_without_rollouts():
    rate = ActionRate(window_s=5.0)
    assert rate.per_s(0.0, 0) == 0.0
    rate.add(1.0, 100)
    rate.add(3.0, 300)
    assert rate.per_s(3.0, 300) == 100.0
    assert rate.per_s(7.0, 500) == 50.0, "the count of second 1 has left the window"
    assert rate.per_s(20.0, 300) == 0.0


def test_several_threads_ask_while_counts_are_added():
    """The control group has four threads, and each asking shortens the window. Here they change after every line."""
    rate = ActionRate(window_s=0.0)

    def change_threads(frame: FrameType, event: str, argument: object) -> TraceFunction | None:
        time.sleep(0)
        return change_threads if frame.f_code.co_filename == rollout_actor.__file__ else None

    def add_and_ask() -> set[float]:
        sys.settrace(change_threads)
        found = set()
        for _ in range(200):
            rate.add(1.0, 0)
            found.add(rate.per_s(2.0, 1))
        return found

    with ThreadPoolExecutor(4) as threads:
        asking = [threads.submit(add_and_ask) for _ in range(4)]
    assert set().union(*(each.result() for each in asking)) == {1.0}
