"""Gathering rows from many batches, against a plain table."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from buffer import row_table
from buffer.row_table import RowTable
from tests.trajectories import ids_of, numbered


def table_of(sizes, on_heap=True):
    table, batches, first = RowTable(), [], 0
    for size in sizes:
        batches.append(numbered(first, size))
        table.append(first, batches[-1:], on_heap)
        first += size
    return table, pa.Table.from_batches(batches).combine_chunks().to_batches()[0]


@pytest.mark.parametrize("on_heap", [True, False])
@pytest.mark.parametrize("whole_chunk_bytes", [0, 2**30])
@pytest.mark.parametrize("sizes", [[1] * 40, [7, 1, 30, 2], [64], [33, 32, 16, 8, 1]])
def test_take_gives_rows_in_the_order_asked_for(monkeypatch, sizes, whole_chunk_bytes, on_heap):
    monkeypatch.setattr(row_table, "WHOLE_CHUNK_BYTES", whole_chunk_bytes)
    table, plain = table_of(sizes, on_heap)
    generator = np.random.default_rng(0)
    for _ in range(20):
        rows = generator.permutation(plain.num_rows)[: generator.integers(1, plain.num_rows + 1)]
        taken = table.take(rows)
        assert taken.equals(plain.take(pa.array(rows)))
        assert taken.schema.equals(plain.schema, check_metadata=True)


def test_small_heap_batches_are_merged_and_mapped_ones_left_alone():
    table, plain = table_of([1] * 1000)
    assert len(table.batches(0)) <= 10
    assert pa.Table.from_batches(table.batches(0)).equals(pa.Table.from_batches([plain]))
    mapped, _ = table_of([1] * 100, on_heap=False)
    assert len(mapped.batches(0)) == 100


def test_removed_rows_leave_the_numbers_of_the_others():
    table, plain = table_of([10, 10, 10], on_heap=False)
    table.remove(10, 20)
    assert ids_of(table.take(np.array([25, 3]))) == ids_of(plain.take(pa.array([25, 3])))
    table.append(30, [numbered(30, 5)], on_heap=True)
    assert ids_of(table.take(np.array([32, 29]))) == ["32", "29"]


def test_merging_stops_at_a_removed_range():
    table = RowTable()
    table.append(0, [numbered(0, 4)], on_heap=True)
    table.append(10, [numbered(10, 4)], on_heap=True)
    assert ids_of(table.take(np.array([13, 0]))) == ["13", "0"]
