"""What a driver of `test_cluster_room` does on a cluster of three nodes; prints what it found as JSON."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import ray
from ray._private.state import actors as actor_info
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.pool.ray_crew import at_best_on, node_for_actor
from actors.settings import ActorsSettings
from buffer.settings import BufferSettings
from launch.cluster.placement import Node
from launch.cluster.room import ClusterRoom, live_nodes
from launch.run.buffer_shards import start_buffer
from launch.settings.recipe import read_recipe
from tests.trajectories import CONTRACT

TIMEOUT_S = 120.0
POLL_S = 0.1


@ray.remote(num_cpus=1)
class Process:
    """Stands for a process of a run, or of somebody else."""

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()


def main(recipe: str) -> None:
    ray.init(address="auto", namespace="test", log_to_driver=False)
    nodes = live_nodes()
    found = {
        "offered": {node.name: node.total["CPU"] for node in nodes},
        "waited": wait_for_what_another_holds(recipe, nodes),
        "spread": placed_one_by_one("spread", 3),
        "pack": placed_one_by_one("pack", 2),
        "at once": placed_at_once(5),
        "shards": placed_shards(5),
    }
    print(json.dumps(found))


def wait_for_what_another_holds(recipe: str, nodes: list[Node]) -> dict[str, object]:
    """Learner and actor take two CPUs each, and one of the two nodes with so many is taken at first."""
    (taken,) = (node for node in nodes if node.name == "127.0.0.3")
    there = NodeAffinitySchedulingStrategy(taken.node_id, soft=False)
    other = Process.options(num_cpus=2, scheduling_strategy=there).remote()
    ray.get(other.node.remote(), timeout=TIMEOUT_S)
    told: list[str] = []

    def let_go(missing: str) -> None:
        told.append(missing)
        ray.kill(other)

    placed = ClusterRoom(read_recipe(Path(recipe), ["learner.num_cpus=2", "actors.num_cpus=2"])).place(let_go)
    return {"told": told[0], "nodes": [node.name for nodes in placed.values() for node in nodes]}


def placed_one_by_one(placement: str, count: int) -> list[int]:
    """How many came to each node that has some, most first."""
    settings = ActorsSettings(placement=placement)
    own: Counter[str | None] = Counter()
    actors = []
    for _ in range(count):
        actors.append(Process.options(scheduling_strategy=at_best_on(node_for_actor(settings, own))).remote())
        own[ray.get(actors[-1].node.remote(), timeout=TIMEOUT_S)] += 1
    end(actors)
    return sorted(own.values(), reverse=True)


def placed_at_once(count: int) -> int:
    """How many find a place though all were sent to the node that was free when the first one came."""
    wanted = at_best_on(node_for_actor(ActorsSettings(), {}))
    actors = [Process.options(scheduling_strategy=wanted).remote() for _ in range(count)]
    there = ray.get([actor.node.remote() for actor in actors], timeout=TIMEOUT_S)
    end(actors)
    return len(there)


def placed_shards(count: int) -> list[list[str]]:
    """For each shard of a buffer, the node that its `Shard` names and the one it is on."""
    with tempfile.TemporaryDirectory() as folder:
        settings = BufferSettings(shards=count, capacity=100, min_size=1)
        buffer = start_buffer(Path(folder) / "buffer", CONTRACT, settings, seed=0)
        buffer.newest_version(TIMEOUT_S, while_waiting=lambda: None)
        found = [
            [shard.node_id, actor_info(shard.handle._actor_id.hex())["Address"]["NodeID"]] for shard in buffer.shards
        ]
        assert buffer.close() == []
    return found


def end(actors: list[ray.actor.ActorHandle]) -> None:
    """Until what they held is free again."""
    for actor in actors:
        ray.kill(actor)
    deadline = time.monotonic() + TIMEOUT_S
    while any(node.free.get("CPU") != node.total["CPU"] for node in live_nodes()):
        assert time.monotonic() < deadline, f"not free again: {live_nodes()}"
        time.sleep(POLL_S)


if __name__ == "__main__":
    main(sys.argv[1])
