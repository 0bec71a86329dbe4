"""What a rollout actor decides between two engine steps."""

from __future__ import annotations

import pytest

from actors.rollout_rules import MAX_INSERTS_IN_FLIGHT, finishes_first, has_room, rollout_activity, shard_in_turn


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


def test_inserts_in_flight_are_bounded_in_number_and_bytes():
    assert has_room(10**9, [], 100), "one that is alone may have any size"
    assert has_room(40, [60], 100)
    assert not has_room(41, [60], 100)
    assert has_room(1, [1] * (MAX_INSERTS_IN_FLIGHT - 1), 100)
    assert not has_room(1, [1] * MAX_INSERTS_IN_FLIGHT, 100)


def test_shards_take_turns_and_those_that_pause_are_passed_over():
    assert [shard_in_turn(turn, "abc", ()) for turn in range(4)] == ["a", "b", "c", "a"]
    assert [shard_in_turn(turn, "abc", "b") for turn in range(3)] == ["a", "c", "c"]
    assert [shard_in_turn(turn, "abc", "abc") for turn in range(3)] == ["a", "b", "c"], "what is finished has to go"
