"""Gathering rows from many batches and segments, against a plain table."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.store import gather
from tests.stores import open_store
from tests.trajectories import BACKSPACE, EOS, batch_of, expert_row, numbered, row

SAMPLING = {"temperature": 0.5, "top_p": 0.25, "backspace": False}
KINDS = {
    "policy": row("a", [5, BACKSPACE, 6]),
    "no action": row("a", []),
    "no text": row("a", [5], task="", actor=""),
    "short": row("a", [5, 6], prompt_ids=[7], task="b", actor="c" * 13),
    "inline": row("a", [5, 6, 7], prompt_ids=[7, 8, 9, 10]),
    "expert": expert_row("a", [5, 6, EOS]),
    "noise": expert_row("a", [5, 6, EOS], executed=[None, 9, None]),
    "other sampling": row("a", [5], sampling=SAMPLING),
    "negative zero": row("a", [5], sampling={**SAMPLING, "temperature": -0.0}),
    "zero": row("a", [5], sampling={**SAMPLING, "temperature": 0.0}),
    "features": row("a", [5], features=[0.5, 1.0], reward=0.25),
    "long": row("a", [5] * 300, prompt_ids=[7] * 40, weights_fingerprint=None),
}


@settings(max_examples=60, deadline=None)
@given(
    batches=st.lists(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=6), min_size=1, max_size=12),
    few_contexts=st.booleans(),
    data=st.data(),
)
def test_any_kinds_of_rows_in_any_batches_of_small_segments(tmp_path_factory, batches, few_contexts, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "_FEWEST_CONTEXTS", 2 if few_contexts else 1000)
        store = open_store(tmp_path_factory.mktemp("g") / "b", capacity=1000, segment_bytes=4_000, fsync="none")
        plain, first = [], 0
        for kinds in batches:
            rows = [{**KINDS[kind], "id": str(first + place)} for place, kind in enumerate(kinds)]
            batch = batch_of(rows)
            assert store.insert(batch).accepted == len(rows)
            plain.append(batch)
            first += len(rows)
            if data.draw(st.booleans()):
                check(store, pa.concat_batches(plain), data)
        check(store, pa.concat_batches(plain), data)
        store.close()
        store = open_store(store._folder, capacity=1000, segment_bytes=4_000, fsync="none")
        check(store, pa.concat_batches(plain), data)
        store.close()


def check(store, plain, data):
    rows = np.array(data.draw(st.lists(st.integers(0, plain.num_rows - 1), min_size=1, max_size=12)))
    taken = store._shard.gather.take(rows)
    taken.validate(full=True)
    expected = plain.take(pa.array(rows))
    assert taken.schema.equals(expected.schema, check_metadata=True)
    assert str(taken.to_pylist()) == str(expected.to_pylist()), "-0.0 is not 0.0"


def test_what_stands_under_a_null_list_is_not_gathered(tmp_path):
    batch = batch_of([expert_row("a", [5, 6]), row("b", [7])])
    index = batch.schema.get_field_index("policy_version")
    offsets, values = pa.array([0, 2, 3], pa.int32()), pa.array([1, 1, 0], pa.int32())
    hidden = pa.ListArray.from_arrays(offsets, values, mask=pa.array([True, False]))
    store = open_store(tmp_path / "b")
    batch = batch.set_column(index, batch.schema.field(index), hidden.cast(batch.schema.field(index).type))
    assert store.insert(batch).accepted == 2
    column = store._shard.gather.take(np.array([1, 0])).column("policy_version")
    assert column.to_pylist() == [[0], None]
    assert len(column.values) == 1
    store.close()


def test_more_elements_than_a_batch_can_count_are_refused(tmp_path):
    """Five lists of 2^29 - 1 numbers each, whose bytes nobody looks at."""
    store = open_store(tmp_path / "b")
    store.insert(numbered(0, 5))
    taken = store._shard.gather
    taken.take(np.arange(5))
    store._shard.table.views[:5, 2, 0] = 2**31 - 4
    with pytest.raises(ValueError, match="5 rows with 2684354555 elements are too many"):
        taken.take(np.arange(5))
    store.close()
