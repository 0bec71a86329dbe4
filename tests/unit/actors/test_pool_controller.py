"""The pool's decisions, with processes whose states the test sets."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.pool.controller import MAX_BACKOFF_S, Failure, PoolController
from actors.rollout_actor import PAUSED, THROTTLED, WAITING_FOR_WEIGHTS, ActorStatus
from actors.settings import ActorsSettings

SETTINGS = ActorsSettings(max_restarts=2, start_timeout_s=100.0, health_timeout_s=10.0, drain_timeout_s=20.0)


class ScriptedProcesses:
    """Actors whose states are `seen`; a new one is starting."""

    def __init__(self):
        self.seen = {}
        self.done = []

    def actor_state(self, name):
        return self.seen[name]

    def create_actor(self, name, number):
        assert name == f"actor-{number}"
        assert name not in self.seen, "one process a name"
        self.seen[name] = "starting"
        self.done.append(("create", name))

    def start_actor(self, name):
        assert self.seen[name] == "ready"
        self.seen[name] = "running"
        self.done.append(("start", name))

    def drain_actor(self, name):
        assert self.seen[name] == "running"
        self.done.append(("drain", name))

    def remove_actor(self, name):
        del self.seen[name]
        self.done.append(("remove", name))


class Pool:
    def __init__(self, desired, **changes):
        self.processes = ScriptedProcesses()
        self.controller = PoolController(desired, SETTINGS.model_copy(update=changes), self.processes)

    @property
    def status(self):
        return self.controller.status(newest_version=3)

    @property
    def events(self):
        return [event.message for event in self.status.events]

    @property
    def states(self):
        return {member.name: member.state for member in self.status.members}

    def start_all(self, now_s=0.0):
        self.controller.reconcile(now_s)
        for name in self.processes.seen:
            self.processes.seen[name] = "ready"
        self.controller.reconcile(now_s)
        assert set(self.states.values()) == {"running"}


def status(name, trajectories=0):
    return ActorStatus(name, 0, 0, 0.0, 0, trajectories, 0, 0, "generating")


def test_a_member_from_birth_to_leave():
    pool = Pool(2)
    pool.start_all()
    pool.controller.scale(1)
    pool.controller.reconcile(1.0)
    assert pool.states == {"actor-0": "running", "actor-1": "draining"}, "the youngest leaves"
    pool.processes.seen["actor-1"] = "left"
    pool.controller.reconcile(2.0)
    assert pool.states == {"actor-0": "running"}
    pool.controller.scale(2)
    with pytest.raises(ValueError, match="cannot be negative, got -1"):
        pool.controller.scale(-1)
    pool.controller.reconcile(3.0)
    assert pool.states == {"actor-0": "running", "actor-1": "starting"}, "a free name is used again"
    pool.controller.scale(1)
    pool.controller.reconcile(4.0)
    assert pool.processes.seen == {"actor-0": "running"}, "who is not ready goes at once"


@pytest.mark.parametrize(
    ("seen", "late_s", "reason"),
    [("starting", 101.0, "did not start within 100 s"), ("running", 11.0, "silent for 10 s")],
)
def test_a_member_that_keeps_still_is_replaced(seen, late_s, reason):
    pool = Pool(1)
    pool.controller.reconcile(0.0)
    if seen == "running":
        pool.start_all()
    pool.controller.reconcile(late_s - 2.0)
    assert len(pool.states) == 1
    assert not any("failed" in event for event in pool.events)
    pool.controller.reconcile(late_s)
    assert reason in pool.events[-1]
    pool.controller.reconcile(late_s + 1.0)
    assert pool.states == {"actor-0": "starting"}


def test_an_answer_keeps_a_member_alive():
    pool = Pool(1)
    pool.start_all()
    for now_s in range(5, 60, 5):
        for name in ("actor-0", "actor-7"):  # the second has left meanwhile
            pool.controller.heard_from(name, status(name), now_s)
        pool.controller.reconcile(now_s)
    assert pool.states == {"actor-0": "running"}


def test_a_member_that_does_not_drain_is_ended():
    pool = Pool(1)
    pool.start_all()
    pool.controller.scale(0)
    for now_s in (1.0, 9.0, 17.0, 22.0):
        pool.controller.heard_from("actor-0", status("actor-0"), now_s)
        pool.controller.reconcile(now_s)
    assert pool.states == {}
    assert pool.events[-1] == "actor-0 ended by force: not drained in 20 s"


def test_back_off_doubles_and_the_pool_gives_up_when_nobody_is_left():
    pool = Pool(1, max_restarts=7)
    births = []
    now_s = 0.0
    while pool.status.failure is None:
        pool.controller.reconcile(now_s)
        if pool.processes.seen:
            births.append(now_s)
            pool.processes.seen["actor-0"] = Failure("no memory")
        now_s += 0.5
    waits = [later - earlier for earlier, later in itertools.pairwise(births)]
    assert waits == [1.5, 2.5, 4.5, 8.5, 16.5, MAX_BACKOFF_S + 0.5, MAX_BACKOFF_S + 0.5]
    assert pool.status.failure == "actor-0 failed 8 times in a row, the last time: no memory"
    assert not pool.status.refused


def test_a_trajectory_ends_the_row_of_failures():
    pool = Pool(1)
    for round_ in range(6):
        pool.start_all(100.0 * round_)
        pool.controller.heard_from("actor-0", status("actor-0", trajectories=1), 100.0 * round_)
        pool.processes.seen["actor-0"] = Failure("lost")
        pool.controller.reconcile(100.0 * round_ + 1)
    assert pool.status.failure is None


def test_the_run_goes_on_with_those_that_work():
    pool = Pool(2)
    pool.start_all()
    for now_s in (5.0, 10.0, 15.0):
        pool.controller.heard_from("actor-0", status("actor-0"), now_s)
        pool.controller.reconcile(now_s)
        assert len(pool.states) == 2
        pool.processes.seen["actor-1"] = Failure("its GPU fell off")
        pool.controller.reconcile(now_s)
    assert pool.status.desired == 1
    assert pool.events[-1] == "gave up on actor-1; the run goes on with 1 actors"
    pool.controller.heard_from("actor-0", status("actor-0"), 200.0)
    pool.controller.reconcile(200.0)
    assert pool.states == {"actor-0": "running"}


def test_what_would_fail_again_is_not_tried_again():
    pool = Pool(1)
    pool.controller.reconcile(0.0)
    pool.processes.seen["actor-0"] = Failure("ValueError: no such model", in_vain=True)
    pool.controller.reconcile(1.0)
    pool.controller.reconcile(500.0)
    assert pool.status.refused
    assert pool.status.failure == "actor-0 failed: ValueError: no such model"
    assert pool.states == {}


def test_a_closed_pool_makes_nobody():
    pool = Pool(2)
    pool.start_all()
    pool.controller.close()
    pool.controller.scale(5)
    pool.processes.seen["actor-0"] = Failure("lost")
    pool.controller.reconcile(1.0)
    pool.controller.reconcile(100.0)
    assert ("create", "actor-0") not in pool.processes.done[4:]


def test_the_time_to_join_is_that_to_the_first_rollouts_of_each_life():
    pool = Pool(1)
    pool.controller.reconcile(10.0)
    pool.processes.seen["actor-0"] = "ready"
    pool.controller.reconcile(15.0)
    for now_s, trajectories in ((16.0, 0), (18.5, 4), (30.0, 9)):
        pool.controller.heard_from("actor-0", status("actor-0", trajectories), now_s)
    assert [member.join_s for member in pool.status.members] == [8.5]
    assert pool.events[-1] == "actor-0 joined: first rollouts after 8.5 s"
    pool.processes.seen["actor-0"] = Failure("lost")
    pool.controller.reconcile(31.0)
    pool.controller.reconcile(40.0)
    assert [member.join_s for member in pool.status.members] == [None], "a successor joins anew"


@pytest.mark.parametrize("activity", [WAITING_FOR_WEIGHTS, PAUSED, THROTTLED])
def test_who_is_made_to_wait_has_no_time_to_join(activity):
    pool = Pool(1)
    pool.start_all()
    pool.controller.heard_from("actor-0", replace(status("actor-0"), activity=activity), 1.0)
    pool.controller.heard_from("actor-0", status("actor-0", trajectories=4), 2.0)
    assert [member.join_s for member in pool.status.members] == [None]
    assert "actor-0 joined" not in "\n".join(pool.events)


@settings(deadline=None, max_examples=60)
@given(
    wanted=st.lists(st.integers(0, 6), min_size=1, max_size=12),
    fates=st.lists(st.sampled_from(["ready", "left", "failed"]), min_size=12, max_size=12),
)
def test_there_are_never_more_at_work_than_desired_and_all_come_in_the_end(wanted, fates):
    pool = Pool(0, max_restarts=1000)
    now_s = 0.0
    for desired, fate in zip(wanted, fates, strict=False):
        pool.controller.scale(desired)
        for _ in range(3):
            now_s += 1.0
            move_on(pool, now_s, fate)
            staying = [state for state in pool.states.values() if state != "draining"]
            assert len(staying) <= desired
    for _ in range(4):
        now_s += MAX_BACKOFF_S + 1.0
        move_on(pool, now_s, "left")
    assert list(pool.states.values()) == ["running"] * wanted[-1]


def move_on(pool, now_s, fate):
    """One look of the pool; who starts is ready, who drains leaves, or fails."""
    for name, state in pool.states.items():
        if fate == "failed" and state != "starting":
            pool.processes.seen[name] = Failure("lost")
        elif state == "starting":
            pool.processes.seen[name] = "ready"
        elif state == "draining" and fate == "left":
            pool.processes.seen[name] = "left"
        pool.controller.heard_from(name, status(name), now_s)
    pool.controller.reconcile(now_s)
