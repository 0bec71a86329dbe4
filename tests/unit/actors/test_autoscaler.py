"""How many actors a run wants."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from pydantic import ValidationError

from actors.pool.autoscaler import Autoscaler, Observation
from actors.pool.controller import MemberStatus, PoolStatus
from actors.rollout_actor import ActorStatus
from actors.settings import ActorsSettings, AutoscaleSettings
from launch.cluster.capacity import planned_roles, total
from launch.settings.recipe import read_recipe
from tests.benchmarks.scaling_plan import TIMED_RECIPE

SETTINGS = AutoscaleSettings(min=1, max=16, window_s=10.0)


def watch(scaler, desired, waited=0.0, throttled=0.0, seconds=10.0, start_s=0.0):
    """All decisions while draws wait and actors are throttled for such shares of the time."""
    decisions = []
    for tick in range(int(seconds * 10) + 1):
        seen = Observation(
            now_s=start_s + tick / 10,
            desired=desired,
            working=desired,
            throttled=desired if tick % 10 < 10 * throttled else 0,
            sample_waits=tick % 10 < 10 * waited,
        )
        decisions.append(scaler.observe(seen))
    return [decision for decision in decisions if decision is not None]


@pytest.mark.parametrize(
    ("desired", "waited", "throttled", "wanted"),
    [
        (4, 0.0, 0.0, []),
        (4, 0.1, 0.0, []),  # below grow_above
        (4, 0.3, 0.0, [6]),
        (4, 0.5, 0.0, [8]),
        (4, 0.9, 0.0, [8]),  # not more than twice
        (12, 0.9, 0.0, [16]),  # not more than max
        (16, 0.9, 0.0, []),
        (4, 0.0, 0.2, []),  # within the headroom
        (10, 0.0, 0.5, [7]),  # 5 in use, of 7 they are 71 %
        (4, 0.0, 0.9, [1]),
        (1, 0.0, 1.0, []),  # not fewer than min
        (4, 0.3, 0.5, [6]),  # a learner that waits comes first
    ],
)
def test_the_number_follows_who_waits(desired, waited, throttled, wanted):
    assert watch(Autoscaler(SETTINGS), desired, waited, throttled) == wanted


@pytest.mark.parametrize("working", [0, 3, 5])
def test_the_window_begins_when_all_are_at_work(working):
    scaler = Autoscaler(SETTINGS)
    assert watch(scaler, 4, waited=0.5, seconds=9.5) == []
    assert scaler.observe(Observation(9.6, 4, working, 0, sample_waits=True)) is None
    assert watch(scaler, 4, waited=0.5, seconds=9.5, start_s=9.7) == []
    assert watch(scaler, 4, waited=0.5, seconds=1.0, start_s=19.3) == [8]


def test_a_number_that_somebody_changed_begins_a_new_window():
    scaler = Autoscaler(SETTINGS)
    assert watch(scaler, 4, waited=0.5, seconds=9.5) == []
    assert watch(scaler, 6, waited=0.5, seconds=9.5, start_s=9.6) == []
    assert watch(scaler, 40, seconds=10.0, start_s=30.0) == [16], "beyond the bounds it comes back"


@examples(deadline=None, max_examples=200)
@given(need=st.floats(0.05, 40.0), count=st.integers(1, 16))
def test_a_steady_need_is_met_and_then_nothing_changes(need, count):
    """need: actors' worth of rollouts that the learner asks for when it never waits."""
    scaler = Autoscaler(SETTINGS)
    now_s = 0.0
    history = [count]
    for _ in range(200):
        waited, idle = max(1.0 - count / need, 0.0), max(1.0 - need / count, 0.0)
        # One long tick is a window whose shares are exact: throttled and sample_waits may be fractions here.
        wanted = scaler.observe(Observation(now_s, count, count, idle * count, waited))
        now_s += 5.0
        if wanted is not None:
            count = wanted
            history.append(count)
    assert len(history) <= 8, "it settles"
    if 1.0 <= need <= 16.0:
        assert need * (1.0 - SETTINGS.grow_above) <= count
    directions = [later > earlier for earlier, later in itertools.pairwise(history)]
    assert directions in ([True] * len(directions), [False] * len(directions)), "no swinging to and fro"


def test_what_counts_as_work():
    waiting = ["paused", "waiting for weights", "starting"]
    activities = ["generating", "ahead of the learner", "loading weights 3", *waiting]
    members = [
        MemberStatus(f"actor-{number}", "running", 0, ActorStatus("", 0, 0, 0.0, 0, 0, 0, 0, activity))
        for number, activity in enumerate(activities)
    ]
    members += [MemberStatus("new", "running", 0, None), MemberStatus("old", "draining", 0, members[0].status)]
    seen = Observation.of(5.0, PoolStatus(8, 3, tuple(members)), sample_waits=True)
    assert seen == Observation(5.0, desired=8, working=3, throttled=1, sample_waits=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"autoscale": {"min": 3, "max": 2}}, "min=3 is more than max=2"),
        ({"autoscale": {"max": 2}, "count": 3}, "count=3 is not within"),
        ({"autoscale": {"min": 2, "max": 4}}, "count=1 is not within"),
    ],
)
def test_bounds_are_checked(changes, message):
    with pytest.raises(ValidationError, match=message):
        ActorsSettings.model_validate(changes)


def test_the_plan_has_room_for_the_most_actors():
    recipe = read_recipe(TIMED_RECIPE, ["actors.autoscale={max: 5}", "actors.resources={tpu: 2}"])
    assert total(planned_roles(recipe)) == {"CPU": 6.0, "tpu": 10.0}
    assert ActorsSettings(count=3).most == 3
