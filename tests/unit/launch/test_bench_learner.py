"""What the learner's benchmarks train on: every trainer gets the same tokens."""

from __future__ import annotations

import numpy as np
import pytest

from launch.bench.learner_load import LoadSource, make_load

SIZES = {"batch": 16, "length": 12, "vocab_size": 64, "steps": 2, "seed": 0}


def test_texts_share_prompts_exactly_where_they_should():
    load = make_load(**SIZES, prompt_length=6, logs_per_prompt=8)
    prompts = {tuple(text[:6]) for text in load.ids}
    assert len(prompts) == 4
    assert len({tuple(text) for text in load.ids}) == 32
    assert load.actions_per_step == 16 * 6
    assert (load.labels[:, :6] == -100).all()
    assert np.array_equal(load.labels[:, 6:], load.ids[:, 6:])


def test_all_trainers_get_the_same_tokens():
    load = make_load(**SIZES, prompt_length=6, logs_per_prompt=8)
    source = LoadSource(load.trajectories(64))
    drawn = [source.draw(16), source.draw(16), source.draw(16)]
    for step, batch in enumerate(drawn):
        texts = [row["prompt_ids"] + row["actions"] for row in batch.to_pylist()]
        assert texts == load.ids.reshape(2, 16, 12)[step % 2].tolist()


@pytest.mark.parametrize("change", [{"batch": 12}, {"prompt_length": 12}, {"prompt_length": 0}])
def test_sizes_that_do_not_fit(change):
    with pytest.raises(ValueError, match="choose other sizes"):
        make_load(**SIZES | {"prompt_length": 6, "logs_per_prompt": 8} | change)
