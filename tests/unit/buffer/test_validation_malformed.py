"""Batches that no program of ours would send: the door names what is wrong, keeps what is good, and never crashes."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.trajectory.schema import trajectory_schema
from buffer.trajectory.validation import validate
from tests.trajectories import BACKSPACE, CONTRACT, EOS, batch_of, expert_row, row

ROWS = [
    row("a", [5, BACKSPACE, 6], reward=0.5, features=[1.0, 2.0]),
    expert_row("b", [5, 6, EOS], executed=[None, 9, None]),
    row("c", [], weights_fingerprint=None, sampling=None),
    row("d", [5, 6, 7, EOS]),
]
NAMES = trajectory_schema(CONTRACT).names


def replaced(batch, name, column):
    """The batch with another column, of whatever type."""
    arrays = [column if field.name == name else batch.column(field.name) for field in batch.schema]
    fields = [field.with_type(column.type) if field.name == name else field for field in batch.schema]
    return pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields, metadata=batch.schema.metadata))


@pytest.mark.parametrize(
    ("name", "type_"),
    [
        ("actions", pa.large_list(pa.int32())),
        ("actions", pa.list_(pa.int64())),
        ("logprobs", pa.list_(pa.float64())),
        ("id", pa.large_string()),
        ("id", pa.string_view()),
        ("id", pa.binary()),
        ("source", pa.dictionary(pa.int32(), pa.string())),
        ("created_at", pa.timestamp("ns", tz="UTC")),
        ("created_at", pa.timestamp("us")),
    ],
)
def test_a_column_of_another_type_is_refused_by_name(name, type_):
    batch = batch_of(ROWS)
    column = batch.column(name).dictionary_encode() if pa.types.is_dictionary(type_) else batch.column(name).cast(type_)
    with pytest.raises(ValueError, match=rf"column {name} is .*, the schema says"):
        validate(replaced(batch, name, column), CONTRACT)


@pytest.mark.parametrize("name", ["id", "source", "task", "weights_fingerprint", "finish_reason", "actor"])
def test_text_that_is_no_utf8_costs_its_row_only(name):
    batch = batch_of(ROWS)
    texts = [
        b"\xff\xfe" if index == 1 else text and text.encode()
        for index, text in enumerate(batch.column(name).to_pylist())
    ]
    validated = validate(replaced(batch, name, pa.array(texts, pa.binary()).view(pa.string())), CONTRACT)
    (rejection,) = validated.rejections
    assert (rejection.row, rejection.reason) == (1, f"{name} is no UTF-8 text")
    assert rejection.id == (None if name == "id" else "b")
    assert validated.good.equals(batch.take([0, 2, 3]))


def mutable(array):
    """`array` on buffers that may be written to, and those buffers: Arrow checks them before they are spoilt."""
    contents = []

    def rebuild(part):
        children, own = [], part.buffers()
        if pa.types.is_list(part.type):
            children, own = [part.values], own[:2]
        elif pa.types.is_struct(part.type):
            children, own = [part.field(index) for index in range(part.type.num_fields)], own[:1]
        copies = [None if buffer is None else bytearray(buffer.to_pybytes()) for buffer in own]
        contents.extend(copy for copy in copies if copy)
        buffers = [None if copy is None else pa.py_buffer(copy) for copy in copies]
        return pa.Array.from_buffers(part.type, len(part), buffers, -1, part.offset, list(map(rebuild, children)))

    return rebuild(array), contents


def assert_trustworthy(validated):
    """What came through the door can be read to its end, and comes through again."""
    validated.good.validate(full=True)
    assert len(validated.good.to_pylist()) == validated.good.num_rows
    again = validate(validated.good, CONTRACT)
    assert again.rejections == ()
    assert again.good.equals(validated.good)


def assert_named_or_trustworthy(batch, name):
    """The spoilt column is named in an error, or what came through can be read; gives that, or None."""
    try:
        validated = validate(batch, CONTRACT)
    except ValueError as error:
        if name not in str(error):
            raise
        return None
    assert_trustworthy(validated)
    return validated


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    number=st.integers(0, 4),
    numbers=st.lists(st.one_of(st.integers(-2, 20), st.integers(-(2**31), 2**31 - 1)), min_size=1, max_size=8),
    start=st.integers(0, 3),
)
def test_crafted_buffers_never_crash(name, number, numbers, start):
    batch = batch_of(ROWS)
    column, contents = mutable(batch.column(name))
    crafted = replaced(batch, name, column).slice(start)
    if contents:
        content = contents[number % len(contents)]
        garbage = np.array(numbers, dtype=np.int32).tobytes()[: len(content)]
        content[: len(garbage)] = garbage
    assert_named_or_trustworthy(crafted, name)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(NAMES), number=st.integers(0, 4), position=st.integers(0, 2**16), bit=st.integers(0, 7))
def test_flipped_bits_never_crash_nor_change_other_columns(name, number, position, bit):
    batch = batch_of(ROWS)
    column, contents = mutable(batch.column(name))
    flipped = replaced(batch, name, column)
    if contents:
        content = contents[number % len(contents)]
        content[position % len(content)] ^= 1 << bit
    validated = assert_named_or_trustworthy(flipped, name)
    if validated is None:
        return
    refused = {rejection.row for rejection in validated.rejections}
    kept = batch.take(pa.array([index for index in range(batch.num_rows) if index not in refused], pa.int64()))
    for other in NAMES:
        if other != name:
            assert validated.good.column(other).equals(kept.column(other))


@pytest.mark.parametrize("claimed", [0, 1, 4])
def test_a_false_count_of_nulls_never_crashes(claimed):
    batch = batch_of(ROWS)
    bitmap = pa.py_buffer(b"\x0d")  # row 1 is null
    lying = pa.Array.from_buffers(pa.string(), 4, [bitmap, *batch.column("task").buffers()[1:]], null_count=claimed)
    assert_named_or_trustworthy(replaced(batch, "task", lying), "task")
