"""Gathering rows from many batches, against a plain table."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.schema import with_rows, without_rows
from buffer.store import gather_source, row_table
from buffer.store.gather_frame import GatherFrame
from buffer.store.gather_source import VIEW_LANES
from buffer.store.row_table import RowTable
from tests.trajectories import BACKSPACE, EOS, batch_of, expert_row, ids_of, numbered, row


def numbered_at(rows):
    """A stored batch whose ids are its row numbers."""
    batch = pa.concat_batches([numbered(number, 1) for number in rows])
    return with_rows(batch, np.array(rows))


def joined(batches):
    return pa.Table.from_batches(batches).combine_chunks().to_batches()[0]


def table_of(sizes, on_heap=True, step=1):
    """A table whose rows are 0, step, 2 * step, ..., and the same rows as one batch."""
    table, batches, first = RowTable(), [], 0
    for size in sizes:
        batches.append(numbered_at(range(first, first + size * step, step)))
        table.append(batches[-1:], on_heap)
        first += size * step
    return table, joined(batches)


@pytest.mark.parametrize("on_heap", [True, False])
@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("sizes", [[1] * 40, [7, 1, 30, 2], [64], [33, 32, 16, 8, 1]])
def test_take_and_ids_give_rows_in_the_order_asked_for(sizes, step, on_heap):
    table, plain = table_of(sizes, on_heap, step)
    generator = np.random.default_rng(0)
    for _ in range(20):
        positions = generator.permutation(plain.num_rows)[: generator.integers(1, plain.num_rows + 1)]
        expected = without_rows(plain.take(pa.array(positions)))
        taken = table.take(positions * step)
        taken.validate(full=True)
        assert taken.equals(expected)
        assert taken.schema.equals(expected.schema, check_metadata=True)
        assert table.ids(positions * step).equals(expected.column("id"))


KINDS = {
    "policy": row("a", [5, BACKSPACE, 6]),
    "no action": row("a", []),
    "no prompt": row("a", [1], prompt_ids=[], task=""),
    "short": row("a", [1, 5, 6], prompt_ids=[7], task="b", actor="c" * 13),
    "expert": expert_row("a", [5, 6, EOS]),
    "noise": expert_row("a", [5, 6, EOS], realised=[None, 9, None]),
    "features": row("a", [5], features=[0.5, 1.0], reward=0.25),
    "long": row("a", [5] * 300, prompt_ids=[7] * 40, weights_fingerprint=None, sampling=None),
}


@settings(max_examples=150, deadline=None)
@given(
    window_bits=st.sampled_from([11, 30]),
    batches=st.lists(
        st.tuples(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=6), st.integers(0, 2)), min_size=1
    ),
    data=st.data(),
)
def test_any_kinds_of_rows_in_any_batches_and_slices(window_bits, batches, data):
    """Windows of 2 KB are full after two rows of the longest kind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather_source, "WINDOW_BITS", window_bits)
        check_any_kinds(batches, data)


def check_any_kinds(batches, data):
    table, stored, first = RowTable(), [], 0
    for kinds, cut in batches:
        rows = [{**KINDS[kind], "id": str(first + index)} for index, kind in enumerate(kinds)]
        batch = with_rows(batch_of(rows), np.arange(first, first + len(rows))).slice(min(cut, len(rows) - 1))
        table.append([batch], on_heap=bool(cut))
        stored.append(batch)
        first += len(rows)
    plain = joined(stored)
    for _ in range(2):  # the second time rows of batches that the table has not looked at may be among them
        positions = data.draw(st.lists(st.integers(0, plain.num_rows - 1), min_size=1, max_size=12))
        expected = plain.take(pa.array(positions))
        taken = table.take(expected.column("row").to_numpy())
        taken.validate(full=True)
        assert taken.equals(without_rows(expected))


def test_what_stands_under_a_null_list_is_not_gathered():
    batch = with_rows(batch_of([row("a", [5, 6]), row("b", [7])]), np.array([0, 1]))
    index = batch.schema.get_field_index("logprobs")
    column = batch.column(index)
    hidden = pa.ListArray.from_arrays(column.offsets, column.values, type=column.type, mask=pa.array([True, False]))
    batch = batch.set_column(index, batch.schema.field(index), hidden)
    table = RowTable()
    table.append([batch], on_heap=False)
    (taken,) = table.take(np.array([1, 0])).select(["logprobs"]).columns
    assert taken.to_pylist() == [[-0.5], None]
    assert len(taken.values) == 1


def test_an_empty_list_beside_a_null_one_is_not_null():
    """Where the next row begins with the id 1, which marks a null in the records."""
    table = RowTable()
    table.append([with_rows(batch_of([row("a", []), row("b", [1]), expert_row("c", [5])]), np.arange(3))], False)
    column = table.take(np.array([2, 0])).column("policy_version")
    assert column.to_pylist() == [None, []]


def test_a_column_of_one_value_is_compared_bit_by_bit():
    """0.0 equals -0.0, yet is another value."""
    table, samplings = RowTable(), []
    for number, temperature in enumerate([0.0, -0.0]):
        sampling = {"temperature": temperature, "top_p": 1.0, "floor_mask": True}
        samplings.append(sampling)
        table.append([with_rows(batch_of([row(str(number), [5], sampling=sampling)]), np.array([number]))], False)
    assert str(table.take(np.array([1, 0])).column("sampling").to_pylist()) == str(samplings[::-1])


def test_a_column_of_more_items_than_a_batch_can_count():
    """Five lists of 2^29 - 1 numbers each, whose bytes nobody looks at."""
    schema = pa.schema([pa.field("actions", pa.list_(pa.int32()))])
    frame = GatherFrame(schema, ["actions"], frozenset(), [], {}, num_rows=5)
    records = np.zeros((5, VIEW_LANES), dtype=np.int32)
    records[:, 0] = 2**31 - 4
    with pytest.raises(ValueError, match="5 rows with 2684354555 elements are too many"):
        frame.fill(records, np.arange(5), [])


def test_ids_of_no_rows():
    table, _ = table_of([3])
    assert table.ids(np.array([], dtype=np.int64)).equals(pa.array([], pa.string()))


def test_small_heap_batches_are_merged_and_mapped_ones_left_alone():
    table, plain = table_of([1] * 1000)
    assert len(table.batches(0)) == 1000, "nothing is copied before it is asked for"
    table.take(np.array([5]))
    assert len(table.batches(0)) == 1
    for number in range(1000, 1100):
        table.append([numbered_at([number])], on_heap=True)
        table.take(np.array([number]))
        assert len(table.batches(0)) <= 4 * 7
    assert table.batches(0)[0].slice(0, 1000).equals(plain)
    mapped, _ = table_of([1] * 100, on_heap=False)
    mapped.append([numbered_at([100])], on_heap=True)
    mapped.take(np.array([5]))
    assert len(mapped.batches(0)) == 101


def test_batches_of_any_sizes_are_merged_seldom_and_few_are_left():
    generator = np.random.default_rng(0)
    table, num_rows, copied = RowTable(), 0, 0
    rows = numbered_at(range(4000))
    while num_rows + 64 <= 4000:
        size = int(generator.choice([1, 9, 64]))
        table.append([rows.slice(num_rows, size)], on_heap=True)
        num_rows += size
        before = {id(batch) for batch in table.batches(0)}
        table.take(np.array([num_rows - 1]))
        copied += sum(batch.num_rows for batch in table.batches(0) if id(batch) not in before)
        assert len(table.batches(0)) <= 4 * 7
    assert copied < 5 * num_rows


def test_merged_batches_have_no_more_rows_than_they_may(monkeypatch):
    monkeypatch.setattr(row_table, "MERGED_ROWS", 9)
    monkeypatch.setattr(row_table, "MERGED_BATCHES", 2)
    table, _ = table_of([5, 5, 4, 2, 3])
    assert ids_of(table.take(np.array([18, 0]))) == ["18", "0"]
    assert [batch.num_rows for batch in table.batches(0)] == [5, 9, 5]


def test_batches_before_and_after_a_division_are_merged_apart():
    table, _ = table_of([1] * 20)
    table.divide()
    for number in range(20, 60):
        table.append([numbered_at([number])], on_heap=True)
        if number % 3 == 0:
            table.take(np.array([number, 0]))
    assert table.batches(0)[0].num_rows == 20
    table.replace(0, 20, [numbered_at(range(20))], on_heap=False)
    assert ids_of(table.take(np.array([59, 20, 19, 0]))) == ["59", "20", "19", "0"]


def test_holds_only_rows_that_are_there():
    table = RowTable()
    assert not table.holds(np.array([0]))
    assert table.holds(np.array([], dtype=np.int64))
    table.append([numbered_at([3, 5, 9]), numbered_at([12])], on_heap=False)
    assert table.holds(np.array([12, 3, 9, 3]))
    for absent in (0, 4, 10, 13):
        assert not table.holds(np.array([3, absent]))


def test_removed_rows_leave_the_numbers_of_the_others():
    table, plain = table_of([10, 10, 10], on_heap=False)
    table.remove(10, 20)
    assert not table.holds(np.array([10]))
    assert ids_of(table.take(np.array([25, 3]))) == ids_of(plain.take(pa.array([25, 3])))
    table.append([numbered_at(range(30, 35))], on_heap=True)
    assert ids_of(table.take(np.array([32, 29]))) == ["32", "29"]


def test_replaced_batches_may_leave_rows_out():
    table, _ = table_of([10, 10, 10], on_heap=False)
    table.replace(0, 20, [numbered_at([2, 15])], on_heap=False)
    assert ids_of(table.take(np.array([25, 15, 2]))) == ["25", "15", "2"]
    assert not table.holds(np.array([3]))
    table.replace(20, 30, [], on_heap=False)
    assert len(table.batches(0)) == 1
    assert len(table.batches(0, 20)) == 1
    assert table.batches(0, 15) == []


def test_a_row_that_is_not_there_is_never_answered_with_another():
    table = RowTable()
    table.append([numbered_at([3, 5, 9])], on_heap=False)
    for read in (table.take, table.ids):
        with pytest.raises(AssertionError, match="does not hold"):
            read(np.array([4]))


def test_rows_out_of_order_are_refused():
    table, _ = table_of([3])
    with pytest.raises(AssertionError, match="in order"):
        table.append([numbered_at([2])], on_heap=False)


def test_a_table_without_rows_gives_none_and_misses_what_is_asked_for():
    table = RowTable()
    assert table.ids(np.array([], dtype=np.int64)).to_pylist() == []
    with pytest.raises(AssertionError, match="a row that the table does not hold"):
        table.ids(np.array([3]))
