"""Whether the processes of a run fit on the nodes of a cluster, and where they go."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from actors.pool.node_choice import NodeRoom, choose_node, in_units
from launch.cluster.placement import ACTORS, LEARNER, Node, Role, assign, bundles, plan_lines, planned_roles, total
from launch.errors import UserError
from launch.settings.recipe import read_recipe

RECIPE = Path("launch/recipes/arithmetic_cpu.yaml")


def role(name, count, placement="pack", **each):
    return Role(name, count, in_units(each), placement)


def cluster(*free, busy=None):
    """Nodes with these resources. busy: what is taken, by the number of a node."""
    nodes = []
    for number, resources in enumerate(free):
        offered = in_units(resources)
        taken = in_units((busy or {}).get(number, {}))
        left = {kind: amount - taken.get(kind, 0) for kind, amount in offered.items()}
        nodes.append(Node(f"id-{number}", f"10.0.0.{number}", left, offered))
    return nodes


def counts(assignment, name, nodes):
    found = Counter(node.node_id for node in assignment[name])
    return [found[node.node_id] for node in nodes]


def test_pack_takes_few_nodes_and_spread_takes_many():
    nodes = cluster({"CPU": 3}, {"CPU": 8}, {"CPU": 4})
    for placement, expected in (("pack", [0, 5, 0]), ("spread", [1, 2, 2])):
        placed = assign([role(LEARNER, 5, placement, CPU=1)], nodes)
        assert counts(placed, LEARNER, nodes) == expected
    placed = assign([role(LEARNER, 10, "pack", CPU=1)], nodes)
    assert counts(placed, LEARNER, nodes) == [0, 8, 2], "the next largest, when the first is full"


def test_fractions_add_up_exactly():
    nodes = cluster({"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 1})
    each = {"CPU": 0.1, "GPU": 0.1}
    placed = assign([role(ACTORS, 20, **each)], nodes)
    assert counts(placed, ACTORS, nodes) == [10, 10], "ten times 0.1 is 1, and no less"
    with pytest.raises(UserError, match=r"the plan needs 2\.1 CPU \(2\.1 for actors\), the cluster has 2 free"):
        assign([role(ACTORS, 21, **each)], nodes)


def test_too_little_in_sum_is_told_by_kind_role_and_node():
    nodes = cluster({"CPU": 4}, {"CPU": 2}, {"tpu": 1}, busy={0: {"CPU": 1}})
    with pytest.raises(UserError) as error:
        assign([role(LEARNER, 2, CPU=1), role(ACTORS, 2, CPU=2)], nodes)
    assert str(error.value) == (
        "the plan needs 6 CPU (2 for learner, 4 for actors), the cluster has 5 free (10.0.0.0 3 of 4, 10.0.0.1 2 of 2):"
        " lower learner.num_cpus, actors.num_cpus, learner.num_ranks, actors.count (with autoscale: "
        "actors.autoscale.max), or raise cluster.num_cpus or add nodes"
    )
    with pytest.raises(UserError) as error:
        assign([role(LEARNER, 1, CPU=1), role(ACTORS, 3, CPU=0.5, tpu=1)], nodes)
    assert "the plan needs 3 of the custom resource 'tpu' (3 for actors), the cluster has 1 free" in str(error.value)
    assert "`ray start --resources '{\"tpu\": 3.0}'`, or change actors.resources" in str(error.value)


def test_enough_in_sum_but_in_pieces_names_the_process_and_what_each_node_has_left():
    nodes = cluster({"CPU": 3}, {"CPU": 1}, {"CPU": 1})
    with pytest.raises(UserError) as error:
        assign([role(LEARNER, 2, CPU=2)], nodes)
    assert str(error.value) == (
        "the plan does not fit: learner rank 2 of 2 needs 2 CPU on one node; beside the rest of the plan 10.0.0.0 has "
        "1 of 3 CPU left; 10.0.0.1 has 1 of 1 CPU left; 10.0.0.2 has 1 of 1 CPU left: lower learner.num_cpus, "
        "learner.num_ranks, or add nodes"
    )
    with pytest.raises(
        UserError, match=r"actor 2 of 2 needs 1 CPU \+ 1 GPU on one node.*10\.0\.0\.1 has 4 of 4 CPU, 0"
    ):
        assign([role(ACTORS, 2, CPU=1, GPU=1)], cluster({"CPU": 1, "GPU": 2}, {"CPU": 4}))


def test_ranks_make_way_for_actors_that_fit_nowhere_else():
    nodes = cluster({"CPU": 4, "GPU": 1}, {"CPU": 2})
    roles = [role(LEARNER, 2, CPU=1), role(ACTORS, 1, CPU=3, GPU=1)]
    placed = assign(roles, nodes)
    assert counts(placed, LEARNER, nodes) == [0, 2], "packing alone would take the node with the GPU"
    assert counts(placed, ACTORS, nodes) == [1, 0]
    assert counts(assign(roles[:1], nodes), LEARNER, nodes) == [2, 0]


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 1),
    st.integers(1, 3),
    st.sampled_from(["pack", "spread"]),
)
@hypothesis_settings(max_examples=150, deadline=None)
def test_it_is_found_whenever_there_is_a_way(sizes, ranks, actors, rank_cpus, actor_gpus, actor_cpus, placement):
    """Against trying every way."""
    nodes = cluster(*({"CPU": cpus, "GPU": gpus} for cpus, gpus in sizes))
    roles = [
        role(LEARNER, ranks, placement, CPU=rank_cpus),
        role(ACTORS, actors, placement, CPU=actor_cpus, GPU=actor_gpus),
    ]

    def fits(places):
        for number, (cpus, gpus) in enumerate(sizes):
            here = [places[:ranks].count(number), places[ranks:].count(number)]
            if here[0] * rank_cpus + here[1] * actor_cpus > cpus or here[1] * actor_gpus > gpus:
                return False
        return True

    possible = any(fits(places) for places in itertools.product(range(len(sizes)), repeat=ranks + actors))
    if not possible:
        with pytest.raises(UserError, match="the plan"):
            assign(roles, nodes)
        return
    placed = assign(roles, nodes)
    number = {node.node_id: index for index, node in enumerate(nodes)}
    assert fits(tuple(number[node.node_id] for name in (LEARNER, ACTORS) for node in placed[name]))


def test_a_later_actor_goes_where_the_rule_of_the_plan_says():
    each = in_units({"CPU": 1})
    rooms = [NodeRoom("a", in_units({"CPU": 1}), 0), NodeRoom("b", in_units({"CPU": 1}), 2), NodeRoom("c", {}, 5)]
    assert choose_node("pack", each, rooms) == 1
    assert choose_node("spread", each, rooms) == 0
    assert choose_node("spread", in_units({"CPU": 2}), rooms) is None


def test_the_processes_of_a_divided_engine_lie_on_one_node():
    divided = ["actors.tensor_parallel_size=2", "actors.num_gpus=1", "actors.resources={fast: 0.5}", "actors.count=2"]
    recipe = read_recipe(RECIPE, [*divided, "model.num_heads=2", "model.hidden_size=64"])
    learner, actors = planned_roles(recipe)
    assert bundles([actors]) == 2 * [{"CPU": 2.0, "GPU": 2.0, "fast": 1.0}]
    assert any("each of 2 processes on one node" in line for line in plan_lines(recipe))
    pair = {"CPU": 4, "GPU": 2, "fast": 1}
    nodes = cluster({"CPU": 4}, pair, pair)
    assert counts(assign([learner, actors], nodes), ACTORS, nodes) == [0, 1, 1]
    in_pieces = cluster({"CPU": 4}, pair, *(2 * [{"CPU": 4, "GPU": 1, "fast": 1}]))
    with pytest.raises(UserError) as error:
        assign([learner, actors], in_pieces)
    assert str(error.value).startswith(
        "the plan does not fit: actor 2 of 2 (its 2 processes) needs 2 CPU + 2 GPU + 1 fast on one node; "
    )
    assert "10.0.0.2 has 4 of 4 CPU, 1 of 1 GPU, 1 of 1 fast left" in str(error.value)
    assert "actors.tensor_parallel_size" in str(error.value)


def test_the_plan_of_a_recipe():
    recipe = read_recipe(RECIPE, ["learner.num_ranks=2", "actors.autoscale={max: 5}", "actors.num_gpus=0.5"])
    roles = planned_roles(recipe)
    assert total(roles) == {"CPU": 7.0, "GPU": 2.5}, "room for the most actors there may be"
    assert bundles(planned_roles(recipe, 1)) == [{"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 1.0, "GPU": 0.5}]
    assert any("5 x 1 CPU + 0.5 GPU" in line for line in plan_lines(recipe))
    cloning = read_recipe(RECIPE, ["stages.sequencematch.objective={name: behaviour_cloning}"])
    assert [role.name for role in planned_roles(cloning)] == [LEARNER], "no stage needs rollouts"
