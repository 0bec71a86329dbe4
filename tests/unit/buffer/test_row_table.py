"""Gathering rows from many batches, against a plain table."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.store import gather_source
from buffer.store.gather_frame import GatherFrame
from buffer.store.gather_source import VIEW_LANES
from buffer.store.row_table import RowTable
from buffer.trajectory.schema import stored_schema, with_rows, without_rows
from tests.trajectories import BACKSPACE, CONTRACT, EOS, batch_of, expert_row, ids_of, numbered, row

SCHEMA = stored_schema(CONTRACT)


def numbered_at(rows):
    """A stored batch whose ids are its row numbers."""
    batch = pa.concat_batches([numbered(number, 1) for number in rows])
    return with_rows(batch, np.array(rows))


def joined(batches):
    return pa.Table.from_batches(batches).combine_chunks().to_batches()[0]


def content_of(batches):
    """As a segment file holds them."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue().slice(0, sink.getvalue().size - 8)


def rows_in(batches):
    return np.concatenate([batch.column("row").to_numpy() for batch in batches])


def table_of(*segments):
    """segments: the batches of each, numbered 1, 2, ..."""
    table = RowTable(SCHEMA)
    for number, batches in enumerate(segments, start=1):
        table.append(number, partial(content_of, batches), rows_in(batches))
    return table


def numbered_segments(sizes, step=1):
    """Three batches to a segment; the rows are 0, step, 2 * step, ..."""
    ends = np.cumsum([0, *sizes])
    batches = [numbered_at(range(begin * step, end * step, step)) for begin, end in itertools.pairwise(ends)]
    return [batches[at : at + 3] for at in range(0, len(batches), 3)]


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("sizes", [[1] * 40, [7, 1, 30, 2], [64], [33, 32, 16, 8, 1]])
def test_take_and_ids_give_rows_in_the_order_asked_for(sizes, step):
    segments = numbered_segments(sizes, step)
    table, plain = table_of(*segments), joined([batch for batches in segments for batch in batches])
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
    "no noise": row("a", [5], sampling={"temperature": 0.5, "top_p": 0.25, "floor_mask": False}),
    "features": row("a", [5], features=[0.5, 1.0], reward=0.25),
    "long": row("a", [5] * 300, prompt_ids=[7] * 40, weights_fingerprint=None, sampling=None),
}


@settings(max_examples=150, deadline=None)
@given(
    window_bits=st.sampled_from([11, 30]),
    batches=st.lists(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=6), min_size=1),
    data=st.data(),
)
def test_any_kinds_of_rows_in_any_batches_of_a_segment_that_grows_and_moves(window_bits, batches, data):
    """Windows of 2 KB are full after two rows of the longest kind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather_source, "WINDOW_BITS", window_bits)
        check_any_kinds(batches, data)


def check_any_kinds(batches, data):
    table, number, stored = RowTable(SCHEMA), 1, []
    plain = joined([with_rows(batch_of([KINDS[kind] for kind in kinds]), np.arange(len(kinds))) for kinds in batches])
    plain = plain.set_column(0, plain.schema.field("id"), pa.array([str(place) for place in range(plain.num_rows)]))
    plain = with_rows(without_rows(plain), np.arange(plain.num_rows))
    first = 0
    for kinds in batches:
        stored.append(plain.slice(first, len(kinds)))
        table.append(number, partial(content_of, list(stored)), rows_in(stored[-1:]))
        first += len(kinds)
        match data.draw(st.sampled_from(["take", "move", "end", "go on"])):
            case "take":
                check_take(table, plain.slice(0, first), data)
            case "move":
                table.move(number, content_of(stored))
            case "end":
                number, stored = number + 1, []
    for _ in range(2):
        check_take(table, plain, data)


def check_take(table, plain, data):
    positions = data.draw(st.lists(st.integers(0, plain.num_rows - 1), min_size=1, max_size=12))
    expected = plain.take(pa.array(positions))
    taken = table.take(expected.column("row").to_numpy())
    taken.validate(full=True)
    assert taken.equals(without_rows(expected))
    assert table.ids(expected.column("row").to_numpy()).equals(expected.column("id"))


def test_what_stands_under_a_null_list_is_not_gathered():
    batch = with_rows(batch_of([row("a", [5, 6]), row("b", [7])]), np.array([0, 1]))
    index = batch.schema.get_field_index("logprobs")
    column = batch.column(index)
    hidden = pa.ListArray.from_arrays(column.offsets, column.values, type=column.type, mask=pa.array([True, False]))
    batch = batch.set_column(index, batch.schema.field(index), hidden)
    (taken,) = table_of([batch]).take(np.array([1, 0])).select(["logprobs"]).columns
    assert taken.to_pylist() == [[-0.5], None]
    assert len(taken.values) == 1


def test_an_empty_list_beside_a_null_one_is_not_null():
    """Where the next row begins with the id 1, which marks a null in the records."""
    table = table_of([with_rows(batch_of([row("a", []), row("b", [1]), expert_row("c", [5])]), np.arange(3))])
    column = table.take(np.array([2, 0])).column("policy_version")
    assert column.to_pylist() == [None, []]


def test_a_column_of_one_value_is_compared_bit_by_bit():
    """0.0 equals -0.0, yet is another value."""
    samplings = [{"temperature": temperature, "top_p": 1.0, "floor_mask": True} for temperature in (0.0, -0.0)]
    batches = [
        with_rows(batch_of([row(str(number), [5], sampling=sampling)]), np.array([number]))
        for number, sampling in enumerate(samplings)
    ]
    taken = table_of(batches).take(np.array([1, 0]))
    assert str(taken.column("sampling").to_pylist()) == str(samplings[::-1])


def test_a_column_of_more_items_than_a_batch_can_count():
    """Five lists of 2^29 - 1 numbers each, whose bytes nobody looks at."""
    schema = pa.schema([pa.field("actions", pa.list_(pa.int32()))])
    frame = GatherFrame(schema, ["actions"], [], frozenset(), {}, num_rows=5)
    records = np.zeros((5, VIEW_LANES), dtype=np.int32)
    records[:, 0] = 2**31 - 4
    with pytest.raises(ValueError, match="5 rows with 2684354555 elements are too many"):
        frame.fill(records, [])


def test_ids_of_no_rows():
    nothing = np.array([], dtype=np.int64)
    for table in (RowTable(SCHEMA), table_of([numbered_at([0, 1])])):
        assert table.ids(nothing).equals(pa.array([], pa.string()))


def test_holds_only_rows_that_are_there():
    table = RowTable(SCHEMA)
    assert not table.holds(np.array([0]))
    assert table.holds(np.array([], dtype=np.int64))
    table = table_of([numbered_at([3, 5, 9]), numbered_at([12])])
    assert table.holds(np.array([12, 3, 9, 3]))
    for absent in (0, 4, 10, 13):
        assert not table.holds(np.array([3, absent]))


def test_removed_segments_leave_the_numbers_of_the_others_and_their_windows_to_later_ones():
    segments = numbered_segments([10] * 12)
    table, plain = table_of(*segments), joined([batch for batches in segments for batch in batches])
    for number, gone, row_of_each in ((2, range(30, 60), 35), (1, range(30), 5)):
        assert ids_of(table.take(np.array([row_of_each]))) == [str(row_of_each)]
        table.remove([number])
        assert not any(table.holds(np.array([each])) for each in gone)
        asked = np.array([119, 60, 95])
        assert table.take(asked).equals(without_rows(plain.take(pa.array(asked))))
    more = [numbered_at(range(120, 125))]
    table.append(9, partial(content_of, more), rows_in(more))
    assert ids_of(table.take(np.array([122, 60]))) == ["122", "60"]
    assert len(table._windows) == 4


def test_the_oldest_rows_go_for_as_long_as_newer_ones_come():
    table = RowTable(SCHEMA)
    for number in range(300):
        batches = [numbered_at(range(10 * number, 10 * number + 10))]
        table.append(number, partial(content_of, batches), rows_in(batches))
        if number >= 3:
            table.remove([number - 3])
            asked = [10 * number + 9, 10 * number - 20, 10 * number - 1]
            assert ids_of(table.take(np.array(asked))) == [str(each) for each in asked]
    assert len(table._slots.rows.base) == 1024, "as many are here at any moment"


@pytest.mark.parametrize("is_described", [True, False])
def test_replaced_segments_may_leave_rows_out(is_described):
    table = table_of(*numbered_segments([10] * 9))
    if is_described:
        table.take(np.array([0]))
    table.replace([1, 2], 7, content_of([numbered_at([2, 15]), numbered_at([40])]))
    assert ids_of(table.take(np.array([65, 15, 40, 2]))) == ["65", "15", "40", "2"]
    assert not table.holds(np.array([3]))
    table.replace([3], 8, content_of([numbered_at([61])]))
    assert ids_of(table.take(np.array([61, 2]))) == ["61", "2"]


def test_a_row_that_is_not_there_is_never_answered_with_another():
    table = table_of([numbered_at([3, 5, 9])])
    for read in (table.take, table.ids):
        with pytest.raises(AssertionError, match="does not hold"):
            read(np.array([4]))


def test_rows_out_of_order_are_refused():
    table = table_of([numbered_at([0, 1, 2])], [numbered_at([3])])
    for number, rows in ((2, [2]), (1, [4])):
        with pytest.raises(AssertionError, match="in order"):
            table.append(number, partial(content_of, [numbered_at(rows)]), np.array(rows))


def test_a_table_without_rows_gives_none_and_misses_what_is_asked_for():
    with pytest.raises(AssertionError, match="a row that the table does not hold"):
        RowTable(SCHEMA).ids(np.array([3]))
