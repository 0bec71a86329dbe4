"""What a driver of `test_cluster_capacity` does on a cluster of three nodes; prints what it found as JSON."""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import ray
from ray._private.state import actors as actor_info
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.pool.ray_pool import at_best_on
from buffer.settings import BufferSettings
from launch.cluster.capacity import Node, RunCapacity, check_possible, live_nodes
from launch.errors import UserError
from launch.run.buffer_shards import start_buffer
from launch.settings.recipe import read_recipe
from tests.processes import wait_until
from tests.trajectories import CONTRACT

TIMEOUT_S = 120.0


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
        "spread": placed_actors(recipe, "spread", 3),
        "pack": placed_actors(recipe, "pack", 2),
        "small ranks make way": places(recipe, "actors.num_cpus=2", "actors.count=2"),
        "in pieces": refusal(lambda: places(recipe, "actors.num_cpus=1.5", "actors.count=3", "learner.num_cpus=0.1")),
        "too many": refusal(lambda: check_possible(read_recipe(Path(recipe), []), 40)),
        "at once": placed_at_once(nodes[0], 5),
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

    found = places(recipe, "learner.num_cpus=2", "actors.num_cpus=2", while_waiting=let_go)
    return {"told": told[0], "nodes": [name for names in found.values() for name in names]}


def places(
    recipe: str, *overrides: str, while_waiting: Callable[[str], None] = lambda missing: None
) -> dict[str, list[str]]:
    """The node of each process of a plan, by role."""
    names = {node.node_id: node.name for node in live_nodes()}
    with RunCapacity(read_recipe(Path(recipe), overrides)) as capacity:
        capacity.reserve(while_waiting)
        learner = placement_group_table(capacity.learner)["bundles_to_node_id"].values()
        actors = capacity.release_actors()
    wait_until_free()
    return {"learner": [names[each] for each in learner], "actors": sorted(names[each] for each in actors)}


def refusal(refused: Callable[[], object]) -> str:
    try:
        refused()
    except UserError as error:
        wait_until_free()
        return str(error)
    raise AssertionError("not refused")


def placed_actors(recipe: str, placement: str, count: int) -> list[int]:
    """How many come to each node that has some, most first, where they are sent to the nodes of the plan."""
    overrides = [f"actors.placement={placement}", f"actors.count={count}", "learner.num_cpus=0.1"]
    with RunCapacity(read_recipe(Path(recipe), overrides)) as capacity:
        capacity.reserve(lambda missing: None)
        nodes = capacity.release_actors()
        actors = [Process.options(scheduling_strategy=at_best_on(node_id)).remote() for node_id in nodes]
        there = Counter(ray.get([actor.node.remote() for actor in actors], timeout=TIMEOUT_S))
    end(actors)
    return sorted(there.values(), reverse=True)


def placed_at_once(node: Node, count: int) -> int:
    """How many find a place though all are sent to one node, which cannot hold them."""
    actors = [Process.options(scheduling_strategy=at_best_on(node.node_id)).remote() for _ in range(count)]
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
    wait_until_free()


def wait_until_free() -> None:
    def is_free() -> bool:
        return all(node.free.get("CPU") == node.total["CPU"] for node in live_nodes())

    wait_until(is_free, TIMEOUT_S, lambda: f"free nodes: {live_nodes()}")


if __name__ == "__main__":
    main(sys.argv[1])
