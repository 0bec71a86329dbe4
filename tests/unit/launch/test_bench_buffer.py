"""What the buffer's benchmark stores: every store gets the same rollouts."""

from __future__ import annotations

import numpy as np

from buffer.trajectory.validation import validate
from launch.bench.buffer_load import CONTRACT, LISTS, as_arrow, as_padded, make_rollouts

LOAD = make_rollouts((50, 500), (16, 64), seed=0)


def test_rollouts_are_good_and_of_all_lengths():
    batch = as_arrow(LOAD.rollouts(0, 2000))
    assert validate(batch, CONTRACT).rejections == ()
    lengths = batch.column("actions").value_lengths().to_numpy()
    assert 50 <= lengths.min() < 55
    assert 495 < lengths.max() <= 500
    assert abs(lengths.mean() - 275) < 15
    actions = batch.column("actions").flatten().to_numpy()
    assert 0.05 < (actions == CONTRACT.backspace_id).mean() < 0.15


def test_padded_rows_hold_what_arrow_rows_hold():
    logs = LOAD.rollouts(10, 20)
    batch, padded = as_arrow(logs), as_padded(logs, LOAD)
    assert {len(column) for column in padded.values()} == {20}
    for name in LISTS:
        lengths = padded["prompt_length" if name == "prompt_ids" else "length"]
        unpadded = [row[:length].tolist() for row, length in zip(padded[name], lengths, strict=True)]
        assert unpadded == batch.column(name).to_pylist()
        assert all(not np.any(row[length:]) for row, length in zip(padded[name], lengths, strict=True))
