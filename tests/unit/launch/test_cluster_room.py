"""Waiting for room, and what Ray's autoscaler is asked for, with a cluster whose nodes come and go by a script."""

from __future__ import annotations

import pytest
import ray

from actors.pool.node_choice import in_units
from launch.cluster import room as cluster_room
from launch.cluster.placement import ACTORS, LEARNER, Node
from launch.cluster.room import ClusterRoom, check_possible
from launch.errors import UserError
from launch.settings.recipe import read_recipe
from tests.unit.launch.test_placement import RECIPE

GROWING = ("cluster.grow_timeout_s=30", "actors.num_cpus=2", "actors.autoscale={max: 2}")


class ScriptedCluster:
    """`views`: the nodes at each look; the last one stays. Keeps what the autoscaler is asked for."""

    def __init__(self, monkeypatch, *views):
        self.views = list(views)
        self.requests = []
        self.now_s = 0.0
        monkeypatch.setattr(cluster_room, "live_nodes", self.look)
        monkeypatch.setattr(cluster_room, "request_resources", self.request)
        monkeypatch.setattr(cluster_room.time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(cluster_room.time, "sleep", self.sleep)
        monkeypatch.setattr(ray, "is_initialized", lambda: True)

    def look(self):
        return self.views.pop(0) if len(self.views) > 1 else self.views[0]

    def request(self, bundles):
        self.requests.append(bundles)

    def sleep(self, seconds):
        self.now_s += seconds


def nodes(*cpus, busy=0):
    """One for each number of CPUs. busy: of the first one's CPUs."""
    free = [cpus[0] - busy, *cpus[1:]]
    return [
        Node(f"id-{number}", f"10.0.0.{number}", in_units({"CPU": left}), in_units({"CPU": offered}))
        for number, (left, offered) in enumerate(zip(free, cpus, strict=True))
    ]


def test_a_cluster_that_grows_is_asked_for_the_whole_plan_and_waited_for(monkeypatch):
    cluster = ScriptedCluster(monkeypatch, nodes(1), nodes(1), nodes(1, 2), nodes(1, 2, 2))
    told = []
    with ClusterRoom(read_recipe(RECIPE, GROWING)) as room:
        placed = room.place(told.append)
        one, two = {"CPU": 1.0}, {"CPU": 2.0}
        assert cluster.requests == [[one, two, two]], "room for the most actors; what is asked for stays what it is"
        assert [node.name for node in placed[LEARNER]] == ["10.0.0.0"], "the actors need the others whole"
        assert len(placed[ACTORS]) == 2
        assert len(told) == 3
        assert all("the plan needs 5 CPU" in line for line in told)
        for _ in range(2):
            room.withdraw()
        assert cluster.requests[1:] == [[]], "told once that nothing is wanted any more"
    assert len(cluster.requests) == 2


def test_room_is_asked_for_beside_what_others_hold(monkeypatch):
    """The autoscaler compares a request with the nodes as if they were empty: whole nodes stand for what is in use."""
    cluster = ScriptedCluster(monkeypatch, nodes(4, 1, busy=3), nodes(4, 1, 2, 2, busy=3))
    with ClusterRoom(read_recipe(RECIPE, GROWING)) as room:
        placed = room.place(lambda missing: None)
        there = [{"CPU": 4.0}, {"CPU": 1.0}]
        assert cluster.requests == [[*there, {"CPU": 2.0}, {"CPU": 2.0}]]
        assert [node.name for node in placed[ACTORS]] == ["10.0.0.2", "10.0.0.3"]
    assert cluster.requests[-1] == []


def test_nodes_that_do_not_come_end_the_wait_with_its_name(monkeypatch):
    cluster = ScriptedCluster(monkeypatch, nodes(1))
    message = r"waited 30 s \(cluster.grow_timeout_s\) for Ray's autoscaler to add nodes: the plan needs 5 CPU"
    with ClusterRoom(read_recipe(RECIPE, GROWING)) as room, pytest.raises(UserError, match=message):
        room.place(lambda missing: None)
    assert 30.0 <= cluster.now_s < 31.0
    assert cluster.requests[-1] == []
    message = r"30 s \(cluster.grow_timeout_s\) .* the plan needs 2 of the custom resource 'tpu' \(2 for actors\)"
    impossible = ClusterRoom(read_recipe(RECIPE, [*GROWING, "actors.resources.tpu=1"]))
    with impossible as room, pytest.raises(UserError, match=message):
        room.place(lambda missing: None)


def test_what_others_hold_is_waited_for_where_the_cluster_stays_as_it_is(monkeypatch):
    cluster = ScriptedCluster(monkeypatch, nodes(2, busy=2), nodes(2, busy=1), nodes(2))
    room = ClusterRoom(read_recipe(RECIPE))
    assert [node.name for node in room.place(lambda missing: None)[ACTORS]] == ["10.0.0.0"]
    assert cluster.requests == [], "no autoscaler is asked"
    cluster.views = [nodes(2, busy=1)]
    with pytest.raises(UserError, match=r"the plan needs 2 CPU .* the cluster has 1 free"):
        room.place(lambda missing: None)
    assert cluster.now_s >= cluster_room.RELEASE_TIMEOUT_S


def test_what_can_never_fit_is_refused_at_once(monkeypatch):
    cluster = ScriptedCluster(monkeypatch, nodes(1))
    settings = read_recipe(RECIPE)
    with pytest.raises(UserError, match="the plan needs 2 CPU"):
        ClusterRoom(settings).place(lambda missing: None)
    assert cluster.now_s == 0.0
    check_possible(settings, 0)
    with pytest.raises(UserError, match=r"the plan needs 4 CPU \(1 for learner, 3 for actors\)"):
        check_possible(settings, 3)
    check_possible(read_recipe(RECIPE, GROWING), 50)
