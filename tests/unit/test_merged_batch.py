"""Many batches written as one, against Arrow's own concatenation."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.schema import stored_schema, with_rows
from buffer.store.merged_batch import merged_message
from buffer.store.segments import END_OF_STREAM
from tests.trajectories import BACKSPACE, CONTRACT, EOS, batch_of, expert_row, row

KINDS = {
    "policy": row("a", [5, BACKSPACE, 6]),
    "no action": row("a", []),
    "expert": expert_row("ä", [5, 6, EOS]),
    "noise": expert_row("a", [5, 6, EOS], realised=[None, 9, None]),
    "features": row("a", [5], features=[0.5, 1.0], reward=0.25),
    "long": row("a" * 50, [5] * 300, weights_fingerprint=None, sampling=None),
}
BATCHES = st.lists(
    st.tuples(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=6), st.integers(0, 3)), min_size=1
)


def merged(batches, schema):
    content = b"".join([schema.serialize(), *merged_message(batches, schema), END_OF_STREAM])
    (batch,) = pa.ipc.open_stream(content)
    batch.validate(full=True)
    return batch


@settings(max_examples=100, deadline=None)
@given(BATCHES)
def test_any_kinds_of_rows_in_any_batches_and_slices(batches):
    parts, first = [], 0
    for kinds, cut in batches:
        batch = with_rows(batch_of([KINDS[kind] for kind in kinds]), np.arange(first, first + len(kinds)))
        parts.append(batch.slice(min(cut, len(kinds) - 1)))
        first += len(kinds)
    assert merged(parts, stored_schema(CONTRACT)) == pa.concat_batches(parts)


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9])
def test_what_stands_under_a_null_is_no_part_of_a_value(num_rows):
    lists = pa.array([[number, number] for number in range(num_rows)], pa.list_(pa.int64()))
    mask = pa.array([number % 3 == 0 for number in range(num_rows)])
    hidden = pa.ListArray.from_arrays(lists.offsets, lists.values, type=lists.type, mask=mask)
    batch = pa.record_batch({"numbers": hidden, "texts": pa.array(["x" * number for number in range(num_rows)])})
    assert merged([batch, batch], batch.schema) == pa.concat_batches([batch, batch])
