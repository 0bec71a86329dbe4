"""Turns, clocks and ratios of the benchmarks, and what their backends are given."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from buffer.trajectory.validation import validate
from launch.errors import UserError
from tests.benchmarks.backend import Stopwatch, Timed, measure_in_turn
from tests.benchmarks.buffer_load import ACTIONS, CONTRACT, LISTS, PROMPT_TOKENS, as_arrow, as_padded, make_rollouts
from tests.benchmarks.learner_load import LoadSource, make_load

SIZES = {"batch": 16, "length": 12, "vocab_size": 64, "steps": 2, "seed": 0}


def test_backends_take_turns_and_who_goes_first_alternates():
    log = []

    def work(name):
        log.append(name)
        return {"work": Timed(10.0, wall_s=len(log))}

    results = measure_in_turn({"a": partial(work, "a"), "b": partial(work, "b")}, repetitions=3, warm_ups=1)
    assert log == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert results.seconds("a", "work") == [3.0, 6.0, 7.0]
    assert results.rates("b", "work") == [10 / 4, 10 / 5, 10 / 8]
    assert results.rate("a", "work") == 10 / 6
    assert results.ratios("a", "b", "work") == pytest.approx([4 / 3, 5 / 6, 8 / 7])


def test_a_stopwatch_adds_up_what_has_one_name():
    watch = Stopwatch()
    for amount in (2, 3):
        with watch.time("pack", amount):
            sum(range(10_000))
    timed = watch.timed["pack"]
    assert timed.amount == 5
    assert timed.cpu_s > 0
    assert timed.rate("wall_s") == 5 / timed.wall_s


def test_rollouts_are_valid_and_of_all_lengths():
    batch = as_arrow(make_rollouts(ACTIONS, PROMPT_TOKENS, seed=0).rollouts(0, 2000))
    assert validate(batch, CONTRACT).rejections == ()
    lengths = batch.column("actions").value_lengths().to_numpy()
    assert 50 <= lengths.min() < 55
    assert 495 < lengths.max() <= 500
    actions = batch.column("actions").flatten().to_numpy()
    assert 0.05 < (actions == CONTRACT.backspace_id).mean() < 0.15


def test_padded_rows_hold_what_arrow_rows_hold():
    load = make_rollouts(ACTIONS, PROMPT_TOKENS, seed=0)
    logs = load.rollouts(10, 20)
    batch, padded = as_arrow(logs), as_padded(logs, load)
    for name in LISTS:
        lengths = padded["prompt_length" if name == "prompt_ids" else "length"]
        unpadded = [row[:length].tolist() for row, length in zip(padded[name], lengths, strict=True)]
        assert unpadded == batch.column(name).to_pylist()
        assert all(not np.any(row[length:]) for row, length in zip(padded[name], lengths, strict=True))


def test_all_trainers_get_the_same_tokens_and_prompts_are_shared():
    load = make_load(**SIZES, prompt_length=6, logs_per_prompt=8)
    source = LoadSource(load.trajectories(64))
    for step in range(3):
        texts = [row["prompt_ids"] + row["actions"] for row in source.draw(16).to_pylist()]
        assert texts == load.ids.reshape(2, 16, 12)[step % 2].tolist()
    assert len({tuple(text[:6]) for text in load.ids}) == 4
    assert len({tuple(text) for text in load.ids}) == 32
    assert (load.labels[:, :6] == -100).all()
    assert np.array_equal(load.labels[:, 6:], load.ids[:, 6:])


@pytest.mark.parametrize("change", [{"batch": 12}, {"prompt_length": 12}, {"prompt_length": 0}])
def test_sizes_that_do_not_fit(change):
    with pytest.raises(UserError, match="choose other sizes"):
        make_load(**SIZES | {"prompt_length": 6, "logs_per_prompt": 8} | change)
