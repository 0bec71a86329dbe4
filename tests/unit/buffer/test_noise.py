"""Backspace demonstrations: against a slow oracle, and by what replay makes of the trajectories."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.experts.noise import NoiseCandidates, insert_noise
from buffer.experts.ragged import Ragged
from buffer.trajectory.replay import TrajectoryArrays, final_token_ids, replay

EOS, BACKSPACE = 2, 3
SLOT = st.tuples(st.integers(4, 9), st.none() | st.integers(0, 9))  # (label, what is drawn before it)
ANSWER = st.lists(SLOT, max_size=6)


def ragged(rows: list[list[int]]) -> Ragged:
    return Ragged.from_lengths(
        np.array([len(row) for row in rows], dtype=np.int64), np.array(list(chain.from_iterable(rows)), dtype=np.int32)
    )


def oracle(row: list[int], draws: list[int | None]) -> tuple[list[int], list[int | None]]:
    """One row, token by token, as the method describes it."""
    actions: list[int] = []
    executed: list[int | None] = []
    for label, drawn in zip(row, draws, strict=True):
        if drawn is not None and drawn not in (label, EOS, BACKSPACE):
            actions += [label, BACKSPACE]
            executed += [drawn, None]
        actions.append(label)
        executed.append(None)
    return actions, executed


def noisy_rows(rows: list[list[int]], draws: list[list[int | None]]):
    flat = list(chain.from_iterable(draws))
    positions = np.array([index for index, drawn in enumerate(flat) if drawn is not None], dtype=np.int64)
    tokens = np.array([drawn for drawn in flat if drawn is not None], dtype=np.int32)
    return insert_noise(ragged(rows), positions, tokens, BACKSPACE, [EOS])


@given(st.lists(st.tuples(ANSWER, st.none() | st.integers(0, 9), st.booleans()), max_size=5))
@settings(max_examples=300, deadline=None)
def test_insert_noise_equals_the_oracle_and_replays_to_the_clean_answer(examples) -> None:
    # The last position of a complete answer is the one before <eos>; a truncated answer has none.
    rows = [[label for label, _ in answer] + ([EOS] if complete else []) for answer, _, complete in examples]
    draws = [[drawn for _, drawn in answer] + ([last] if complete else []) for answer, last, complete in examples]
    noisy, executed = noisy_rows(rows, draws)
    expected = [oracle(row, drawn) for row, drawn in zip(rows, draws, strict=True)]
    assert noisy.to_arrow().to_pylist() == [actions for actions, _ in expected]
    assert executed.to_pylist() == [
        tokens if any(token is not None for token in tokens) else None for _, tokens in expected
    ]

    batch = pa.record_batch(
        {
            "actions": noisy.to_arrow(),
            "executed": executed,
            "prompt_ids": pa.array([[5]] * len(rows), pa.list_(pa.int32())),
        }
    )
    action_logs = TrajectoryArrays.from_batch(batch)
    offsets, ids = final_token_ids(action_logs, replay(action_logs, BACKSPACE), BACKSPACE)
    assert Ragged(offsets, ids).to_arrow().to_pylist() == rows


@pytest.mark.parametrize(
    ("row", "draws", "actions", "executed"),
    [
        ([7, EOS], [None, 8], [7, EOS, BACKSPACE, EOS], [None, 8, None, None]),  # <eos> stays the label
        ([EOS], [9], [EOS, BACKSPACE, EOS], [9, None, None]),
        ([7, EOS], [7, None], [7, EOS], None),  # void: the label, <eos> and backspace are no mistakes
        ([7, EOS], [EOS, None], [7, EOS], None),
        ([7, EOS], [BACKSPACE, None], [7, EOS], None),
    ],
)
def test_known_rows(row, draws, actions, executed) -> None:
    found, column = noisy_rows([row], [draws])
    assert (found.values.tolist(), column.to_pylist()) == (actions, [executed])


def test_no_eos_of_several_becomes_noise() -> None:
    tokens = np.array([EOS, 9, 4], dtype=np.int32)
    _, executed = insert_noise(ragged([[7, 8, 6, EOS]]), np.array([0, 1, 2]), tokens, BACKSPACE, [EOS, 9])
    assert executed.to_pylist() == [[None, None, 4, None, None, None]]


def test_candidates_are_drawn_with_their_chances_within_their_group() -> None:
    candidates = NoiseCandidates.weighted(
        [np.array([4, 5, 6], np.int32), np.array([5, 7], np.int32)], [np.array([1.0, 0.0, 3.0]), np.array([1.0, 1.0])]
    )
    groups = np.tile(np.array([0, 1, 1, 0]), 25_000)
    tokens = candidates.sample(groups, np.random.default_rng(1))
    for group, chances in ((0, {4: 0.25, 6: 0.75}), (1, {5: 0.5, 7: 0.5})):
        of_group = tokens[groups == group]
        ids, counts = np.unique(of_group, return_counts=True)
        assert set(ids.tolist()) == set(chances)
        expected = np.array([chances[token] for token in ids.tolist()]) * len(of_group)
        assert ((counts - expected) ** 2 / expected).sum() < 15.1  # chi-squared, 1 degree of freedom: p = 1e-4


class _LastDouble(np.random.Generator):
    """Draws the largest double below 1 only: added to a group's number it rounds up to the next group's."""

    def random(self, size):  # type: ignore[override]
        return np.full(size, np.nextafter(1.0, 0.0))


def test_a_draw_that_rounds_up_stays_in_its_group() -> None:
    candidates = NoiseCandidates.uniform([np.array([4], np.int32), np.array([5, 6], np.int32), np.array([7], np.int32)])
    tokens = candidates.sample(np.array([0, 1, 2]), _LastDouble(np.random.PCG64(0)))
    assert tokens.tolist() == [4, 6, 7]


def test_candidates_without_weight_are_refused() -> None:
    with pytest.raises(ValueError, match="group 1"):
        NoiseCandidates.weighted([np.array([4], np.int32)] * 2, [np.ones(1), np.zeros(1)])
