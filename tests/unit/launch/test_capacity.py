"""What the processes of a run need, and what is said where a cluster lacks it."""

from __future__ import annotations

from pathlib import Path

from launch.cluster.capacity import (
    ACTORS,
    LEARNER,
    Node,
    Role,
    missing_capacity,
    plan_lines,
    planned_roles,
    total,
)
from launch.settings.recipe import read_recipe

RECIPE = Path("launch/recipes/arithmetic_cpu.yaml")


def role(name: str, count: int, **each: float) -> Role:
    return Role(name, count, each, "pack")


def cluster(*offered: dict[str, float], busy: dict[int, dict[str, float]] | None = None) -> list[Node]:
    """Nodes with these resources. busy: what is taken, by the number of a node."""
    nodes = []
    for number, resources in enumerate(offered):
        taken = (busy or {}).get(number, {})
        free = {kind: amount - taken.get(kind, 0.0) for kind, amount in resources.items()}
        nodes.append(Node(f"id-{number}", f"10.0.0.{number}", free, resources))
    return nodes


def missing(roles: list[Role], nodes: list[Node]) -> str:
    found = missing_capacity(roles, nodes)
    assert found is not None
    return found


def test_fractions_add_up_exactly() -> None:
    nodes = cluster({"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 1})
    assert missing_capacity([role(ACTORS, 20, CPU=0.1, GPU=0.1)], nodes) is None, "ten times 0.1 is 1, and no less"
    message = missing([role(ACTORS, 21, CPU=0.1, GPU=0.1)], nodes)
    assert message.startswith("the plan needs 2.1 CPU (2.1 for actors), the cluster has 2 free")


def test_too_little_in_sum_is_told_by_kind_role_and_node() -> None:
    nodes = cluster({"CPU": 4}, {"CPU": 2}, {"tpu": 1}, busy={0: {"CPU": 1}})
    assert missing([role(LEARNER, 2, CPU=1), role(ACTORS, 2, CPU=2)], nodes) == (
        "the plan needs 6 CPU (2 for learner, 4 for actors), the cluster has 5 free (10.0.0.0 3 of 4 CPU; 10.0.0.1 2 "
        "of 2 CPU; 10.0.0.2 0 of 0 CPU): lower learner.num_cpus, learner.num_ranks, actors.num_cpus, actors.count (or "
        "actors.autoscale.max), or offer more: cluster.num_cpus of a Ray started here, else nodes (`ray start`, with "
        "--resources for a custom one)"
    )
    message = missing([role(LEARNER, 1, CPU=1), role(ACTORS, 3, CPU=0.5, tpu=1)], nodes)
    assert "the plan needs 3 tpu (3 for actors), the cluster has 1 free" in message
    assert "lower actors.resources, actors.count" in message


def test_what_no_node_has_at_all_is_told_first() -> None:
    message = missing([role(LEARNER, 4, CPU=1), role(ACTORS, 1, CPU=1, GPU=1)], cluster({"CPU": 2}))
    assert "the plan needs 1 GPU (1 for actors), the cluster has 0 free" in message


def test_enough_in_sum_but_in_pieces_names_the_processes_and_what_each_node_has_left() -> None:
    message = missing([role(ACTORS, 2, CPU=1, GPU=1)], cluster({"CPU": 1, "GPU": 2}, {"CPU": 4}))
    assert "the plan does not fit: each actor of 2 needs 1 CPU + 1 GPU on one node" in message
    assert "10.0.0.1 4 of 4 CPU, 0 of 0 GPU" in message


def test_the_processes_of_a_divided_engine_need_one_node() -> None:
    divided = ["actors.tensor_parallel_size=2", "actors.num_gpus=1", "actors.resources={fast: 0.5}", "actors.count=2"]
    recipe = read_recipe(RECIPE, [*divided, "model.num_heads=2", "model.hidden_size=64"])
    learner, actors = planned_roles(recipe)
    assert (actors.count, actors.each) == (2, {"CPU": 2.0, "GPU": 2.0, "fast": 1.0})
    assert any("each of 2 processes on one node" in line for line in plan_lines(recipe))
    pair = {"CPU": 4.0, "GPU": 2.0, "fast": 1.0}
    assert missing_capacity([learner, actors], cluster({"CPU": 4.0}, pair, pair)) is None
    half = {"CPU": 4.0, "GPU": 1.0, "fast": 1.0}
    message = missing([learner, actors], cluster({"CPU": 4.0}, pair, half, half))
    assert message.startswith("the plan does not fit: each actor of 2 needs 2 CPU + 2 GPU + 1 fast on one node")
    assert "actors.tensor_parallel_size" in message


def test_the_plan_of_a_recipe() -> None:
    recipe = read_recipe(RECIPE, ["learner.num_ranks=2", "actors.autoscale={max: 5}", "actors.num_gpus=0.5"])
    assert total(planned_roles(recipe)) == {"CPU": 7.0, "GPU": 2.5}, "capacity for the most actors there may be"
    assert total(planned_roles(recipe, 1)) == {"CPU": 3.0, "GPU": 0.5}
    assert any("5 x 1 CPU + 0.5 GPU" in line for line in plan_lines(recipe))
    cloning = read_recipe(RECIPE, ["stages.sequencematch.objective={name: behavior_cloning}"])
    assert [role.name for role in planned_roles(cloning)] == [LEARNER], "no stage needs rollouts"
