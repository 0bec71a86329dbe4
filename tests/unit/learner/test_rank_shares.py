"""Sharing a batch out: every row once, prompts together, loads even; and a tree without logs weighs nothing."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.batches import build_micro_batches, count_batch, part_of_rank
from tests.objectives import counts_of
from tests.random_trajectories import TREES, random_trajectories
from tests.trajectories import BACKSPACE, batch_of, expert_row, ids_of, row


def prompts_of(batch: pa.RecordBatch) -> list[tuple[int, ...]]:
    return [tuple(prompt) for prompt in batch.column("prompt_ids").to_pylist()]


def shares_of(batch: pa.RecordBatch, size: int) -> list[pa.RecordBatch]:
    return [part_of_rank(batch, rank, size, BACKSPACE) for rank in range(size)]


def num_nodes(batch: pa.RecordBatch) -> int:
    """Upper bound: answers share nothing, logs of one prompt share the prompt."""
    answers = sum(sum(action != BACKSPACE for action in actions) for actions in batch.column("actions").to_pylist())
    return answers + sum(len(prompt) for prompt in set(prompts_of(batch)))


@settings(deadline=None, max_examples=50)
@given(logs=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 20)), min_size=1, max_size=30), size=st.integers(2, 5))
def test_every_row_goes_to_one_rank_with_its_prompt_and_in_order(logs, size):
    rows = [row(str(i), [5] * length, prompt_ids=[9] * prompt) for i, (prompt, length) in enumerate(logs)]
    batch = batch_of(rows)
    shares = shares_of(batch, size)
    ids = [[int(number) for number in ids_of(share)] for share in shares]
    assert sorted(number for share in ids for number in share) == list(range(len(logs)))
    assert all(share == sorted(share) for share in ids)
    owners = [set(prompts_of(share)) for share in shares]
    assert sum(len(owner) for owner in owners) == len(set(prompts_of(batch)))
    # Longest first: nobody exceeds the mean by more than the largest group.
    largest = max(num_nodes(batch.filter(pa.array([p == q for p in prompts_of(batch)]))) for q in prompts_of(batch))
    assert max(num_nodes(share) for share in shares) <= num_nodes(batch) / size + largest


def test_loads_are_even_where_prompts_are_many():
    generator = np.random.default_rng(0)
    rows = [row(str(i), [5] * int(generator.integers(1, 40)), prompt_ids=[i + 3, 4]) for i in range(64)]
    loads = [num_nodes(share) for share in shares_of(batch_of(rows), 4)]
    assert max(loads) - min(loads) <= 2


def test_tokens_taken_back_count_as_nodes_but_backspaces_do_not():
    """Rank 0 gets the log with five nodes, rank 1 the two with two each, though they have more actions."""
    rows = [
        row("long", [5, 6, 7, 8], prompt_ids=[9]),
        row("a", [5, BACKSPACE] * 3, prompt_ids=[10]),
        row("b", [5, 6], prompt_ids=[11]),
    ]
    assert [ids_of(share) for share in shares_of(batch_of(rows), 2)] == [["long"], ["a", "b"]]


def test_noise_that_was_executed_counts_as_what_it_was():
    """The label is backspace or not; what became a node is what the environment appended."""
    noisy = expert_row("noisy", [5, 6, 7], executed=[8, None, None], prompt_ids=[9])
    assert [ids_of(share) for share in shares_of(batch_of([noisy]), 2)] == [["noisy"], []]


def test_one_rank_gets_the_batch_itself():
    batch = random_trajectories("expert", 5, seed=0)
    assert part_of_rank(batch, 0, 1, BACKSPACE) is batch


def test_there_may_be_fewer_prompts_than_ranks():
    shares = shares_of(batch_of([row("a", [5]), row("b", [6])]), 3)
    assert [share.num_rows for share in shares] == [2, 0, 0]


def test_counts_are_those_of_the_trees():
    for batch in (
        random_trajectories("expert", 9, seed=1),
        random_trajectories("policy", 4, seed=2),
        batch_of([row("a", [])]),
    ):
        assert count_batch(batch) == counts_of(*build_micro_batches(batch, TREES))
