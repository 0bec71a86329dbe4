"""A draw cut into micro-batches: every log once, none too large, prompts together, gradients that add up."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.batches import build_micro_batches
from learner.state_tree.batch import TreeBatch, TreeSettings
from tests.oracle import Log, states, to_batch
from tests.unit.learner.test_state_tree import BACKSPACE, EOS, HARD, random_trajectories, text_of
from tests.unit.learner.test_tree_attention import grown_trajectories


def cut(batch: pa.RecordBatch, max_nodes: int, max_positions: int = 128) -> list[TreeBatch]:
    return build_micro_batches(batch, TreeSettings(BACKSPACE, EOS, max_nodes, max_positions))


def trajectories_of(tree: TreeBatch) -> list[tuple[object, ...]]:
    """What identifies each log of a batch: prompt, labels, last text."""
    return [
        (
            tuple(text_of(tree, int(tree.nodes.states[tree.trajectories.start[i]]))),
            tuple(tree.actions.label[tree.actions.trajectory == i].tolist()),
            tuple(text_of(tree, int(tree.nodes.states[tree.trajectories.final[i]]))),
        )
        for i in range(tree.num_trajectories)
    ]


def num_texts(logs: list[Log]) -> int:
    return len({tuple(text[:d]) for log in logs for text in states(log, BACKSPACE) for d in range(1, len(text) + 1)})


@settings(max_examples=100, deadline=None)
@given(logs=random_trajectories(), max_nodes=st.integers(1, 40))
def test_every_log_is_in_one_micro_batch(logs, max_nodes):
    expected = [(tuple(log.prompt), tuple(log.actions), tuple(states(log, BACKSPACE)[-1])) for log in logs]
    trees = cut(to_batch(logs), max_nodes)
    assert sorted(log for tree in trees for log in trajectories_of(tree)) == sorted(expected)
    for tree in trees:
        assert tree.num_nodes <= max_nodes or tree.num_trajectories == 1
    if num_texts(logs) <= max_nodes:
        assert len(trees) == 1


@pytest.mark.parametrize(("max_nodes", "count"), [(681, 1), (680, 2), (300, 3), (60, 28)])
def test_micro_batches_are_few_and_even(max_nodes, count):
    """4 prompts of 20 tokens with 7 rollouts of 21 and up to 2 more tokens each: 681 nodes."""
    trees = cut(to_batch(grown_trajectories(4, 7)), max_nodes)
    sizes = [tree.num_nodes for tree in trees]
    assert len(trees) == count
    assert max(sizes) <= max_nodes
    assert max(sizes) - min(sizes) <= 65  # two or three logs, not a remainder


def test_logs_of_a_prompt_stay_together():
    logs = grown_trajectories(4, 7)
    shuffled = [logs[(i * 5) % len(logs)] for i in range(len(logs))]
    trees = cut(to_batch(shuffled), 200)
    assert len(trees) == 4
    for tree in trees:
        assert len({prompt for prompt, _, _ in trajectories_of(tree)}) == 1
    assert sum(tree.num_nodes for tree in trees) <= num_texts(logs) + 4  # the first tokens of prompts that begin alike


def test_a_draw_that_is_bad_is_refused_before_it_is_cut():
    with pytest.raises(ValueError, match="trajectory 8 has an empty prompt"):
        cut(to_batch([*HARD, Log([], [EOS])]), 4)
    with pytest.raises(ValueError, match="without trajectories"):
        cut(to_batch(HARD).slice(0, 0), 4)
