"""Backspace demonstrations: against a slow oracle, and by what replay makes of the logs."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.experts.noise import NoiseCandidates, choose_noise_positions, insert_noise, prefixes_at
from buffer.experts.ragged import Ragged
from buffer.trajectory.replay import ActionLogs, final_token_ids, replay

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
    realised: list[int | None] = []
    for label, drawn in zip(row, draws, strict=True):
        if drawn is not None and drawn not in (label, EOS, BACKSPACE):
            actions += [label, BACKSPACE]
            realised += [drawn, None]
        actions.append(label)
        realised.append(None)
    return actions, realised


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
    logs = noisy_rows(rows, draws)
    expected = [oracle(row, drawn) for row, drawn in zip(rows, draws, strict=True)]
    assert logs.actions.to_arrow().to_pylist() == [actions for actions, _ in expected]
    assert logs.realised_column().to_pylist() == [
        realised if any(token is not None for token in realised) else None for _, realised in expected
    ]
    planted = sum(token is not None for _, realised in expected for token in realised)
    assert logs.num_void == sum(token is not None for row in draws for token in row) - planted

    batch = pa.record_batch(
        {
            "actions": logs.actions.to_arrow(),
            "realised": logs.realised_column(),
            "prompt_ids": pa.array([[5]] * len(rows), pa.list_(pa.int32())),
        }
    )
    action_logs = ActionLogs.from_batch(batch)
    offsets, ids = final_token_ids(action_logs, replay(action_logs, BACKSPACE), BACKSPACE)
    assert Ragged(offsets, ids).to_arrow().to_pylist() == rows


def test_noise_before_eos_keeps_eos_as_the_label() -> None:
    logs = noisy_rows([[7, EOS]], [[None, 8]])
    assert logs.actions.values.tolist() == [7, EOS, BACKSPACE, EOS]
    assert logs.realised_column().to_pylist() == [[None, 8, None, None]]


@pytest.mark.parametrize("void", [7, EOS, BACKSPACE])
def test_void_draws_leave_no_trace(void: int) -> None:
    logs = noisy_rows([[7, EOS]], [[void, None]])
    assert logs.actions.values.tolist() == [7, EOS]
    assert logs.realised_column().to_pylist() == [None]
    assert logs.num_void == 1


def test_no_eos_of_several_becomes_noise() -> None:
    tokens = np.array([EOS, 9, 4], dtype=np.int32)
    logs = insert_noise(ragged([[7, 8, 6, EOS]]), np.array([0, 1, 2]), tokens, BACKSPACE, [EOS, 9])
    assert (logs.noise_tokens.tolist(), logs.num_void) == ([4], 2)


def test_an_empty_answer_gets_noise_only_before_its_eos() -> None:
    logs = noisy_rows([[EOS]], [[9]])
    assert logs.actions.values.tolist() == [EOS, BACKSPACE, EOS]


def test_positions_and_tokens_must_agree() -> None:
    with pytest.raises(ValueError, match="2 noise positions need as many tokens, not 1"):
        insert_noise(ragged([[7, 8]]), np.array([0, 1]), np.array([4], dtype=np.int32), BACKSPACE, [EOS])


def test_prefixes_are_prompt_and_answer_so_far() -> None:
    prompts, targets = ragged([[10, 11], [], [12]]), ragged([[4, 5, EOS], [6], [7, 8]])
    prefixes = prefixes_at(prompts, targets, np.array([0, 2, 3, 5]))
    assert prefixes.to_arrow().to_pylist() == [[10, 11], [10, 11, 4, 5], [], [12, 7]]


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.999])
def test_share_of_chosen_positions_is_the_rate(rate: float) -> None:
    num_positions = 200_000
    chosen = choose_noise_positions(num_positions, rate, np.random.default_rng(0))
    standard_error = np.sqrt(rate * (1 - rate) / num_positions)
    assert abs(len(chosen) / num_positions - rate) <= 5 * standard_error
    assert (np.diff(chosen) > 0).all()


def test_candidates_are_drawn_with_their_chances_within_their_group() -> None:
    candidates = NoiseCandidates.weighted(
        [np.array([4, 5, 6], np.int32), np.array([5, 7], np.int32)], [np.array([1.0, 0.0, 3.0]), np.array([1.0, 1.0])]
    )
    groups = np.tile(np.array([0, 1, 1, 0]), 25_000)
    tokens = candidates.draw(groups, np.random.default_rng(1))
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
    tokens = candidates.draw(np.array([0, 1, 2]), _LastDouble(np.random.PCG64(0)))
    assert tokens.tolist() == [4, 6, 7]


def test_candidates_without_weight_are_refused() -> None:
    with pytest.raises(ValueError, match="group 1"):
        NoiseCandidates.weighted([np.array([4], np.int32)] * 2, [np.ones(1), np.zeros(1)])
