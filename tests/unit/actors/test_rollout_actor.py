"""What a rollout actor decides between two engine steps, and the rate of its actions."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import pytest

from actors import rollout_actor
from actors.rollout_actor import ActionRate, finishes_first, rollout_activity

TraceFunction = Callable[[FrameType, str, object], object]


def never():
    raise AssertionError("the shards need not be asked")


@pytest.mark.parametrize(
    ("changes", "activity"),
    [
        ({"version": 2}, "waiting for weights"),
        ({"draining": True}, "draining"),
        ({"paused": True}, "paused"),
        ({"finishing": True}, "finishing rollouts before new weights"),
        ({"held_back": lambda: True}, "ahead of the learner"),
        ({"held_back": lambda: False}, "generating"),
    ],
)
def test_activities_and_that_the_shards_are_asked_last(changes, activity):
    now = {"version": 3, "first_version": 3, "draining": False, "paused": False, "held_back": never, **changes}
    assert rollout_activity(**now) == activity


def test_only_drain_lets_new_weights_wait_and_only_for_rollouts_that_are_under_way():
    assert finishes_first("drain", newest_version=3, version=2, num_unfinished=1)
    assert not finishes_first("drain", newest_version=3, version=2, num_unfinished=0)
    assert not finishes_first("drain", newest_version=2, version=2, num_unfinished=1)
    assert not finishes_first("in_flight", newest_version=3, version=2, num_unfinished=1)


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
