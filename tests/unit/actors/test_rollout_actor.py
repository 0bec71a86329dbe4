"""What a rollout actor decides between two engine steps."""

from __future__ import annotations

import pytest

from actors.rollout_actor import rollout_activity


def never():
    raise AssertionError("the shards need not be asked")


@pytest.mark.parametrize(
    ("changes", "activity"),
    [
        ({"version": 2}, "waiting for weights"),
        ({"draining": True}, "draining"),
        ({"paused": True}, "paused"),
        ({"finishing": True}, "finishing rollouts before new weights"),
        ({"throttled": lambda: True}, "ahead of the learner"),
        ({"throttled": lambda: False}, "generating"),
    ],
)
def test_activities_and_that_the_shards_are_asked_last(changes, activity):
    now = {"version": 3, "first_version": 3, "draining": False, "paused": False, "throttled": never, **changes}
    assert rollout_activity(**now) == activity
