"""Turns, clocks and ratios of the benchmarks, and what their backends are given."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from buffer.trajectory.validation import validate
from launch.errors import UserError
from tests.benchmarks.backend import Timed, measure_in_turn
from tests.benchmarks.buffer_load import CONTRACT, LISTS, as_arrow, as_padded, make_rollouts, take
from tests.benchmarks.learner_backends import LoadSource, make_load

SIZES = {"batch": 16, "length": 12, "vocab_size": 64, "steps": 1, "seed": 0, "prompt_length": 6, "texts_per_prompt": 8}


def test_backends_take_turns_and_who_goes_first_alternates():
    log = []

    def work(name):
        log.append(name)
        return {"work": Timed(10.0, wall_s=len(log))}

    results = measure_in_turn({"a": partial(work, "a"), "b": partial(work, "b")}, repetitions=3, warm_ups=1)
    assert log == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert results.rates("b", "work") == [10 / 4, 10 / 5, 10 / 8]
    assert results.medians("work") == {"a": 10 / 6, "b": 10 / 5}
    assert results.ratios("a", "b", "work") == pytest.approx([4 / 3, 5 / 6, 8 / 7])


def test_rollouts_are_valid_and_padded_rows_hold_what_arrow_rows_hold():
    logs = take(make_rollouts(seed=0), 10, 2000)
    batch, padded = as_arrow(logs), as_padded(logs)
    assert validate(batch, CONTRACT).rejections == ()
    actions = batch.column("actions")
    assert set(actions.value_lengths().to_pylist()) >= {55, 495}
    assert 0.05 < (actions.flatten().to_numpy() == CONTRACT.backspace_id).mean() < 0.15
    for name in LISTS:
        lengths = padded["prompt_length" if name == "prompt_ids" else "length"]
        unpadded = [row[:length].tolist() for row, length in zip(padded[name], lengths, strict=True)]
        assert unpadded == batch.column(name).to_pylist()
        assert all(not np.any(row[length:]) for row, length in zip(padded[name], lengths, strict=True))


def test_all_trainers_get_the_same_tokens_and_prompts_are_shared():
    load = make_load(**SIZES)
    source = LoadSource(load.trajectories(64))
    for step in range(2):
        texts = [row["prompt_ids"] + row["actions"] for row in source.sample(16).to_pylist()]
        assert texts == load.ids.reshape(2, 16, 12)[step].tolist()
    assert len({tuple(text[:6]) for text in load.ids}) == 4
    assert len({tuple(text) for text in load.ids}) == 32
    assert (load.labels[:, :6] == -100).all()
    assert np.array_equal(load.labels[:, 6:], load.ids[:, 6:])


@pytest.mark.parametrize("change", [{"batch": 12}, {"prompt_length": 12}, {"prompt_length": 0}])
def test_sizes_that_do_not_fit(change):
    with pytest.raises(UserError, match="choose other sizes"):
        make_load(**SIZES | change)
