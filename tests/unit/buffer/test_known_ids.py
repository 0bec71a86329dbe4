"""Which ids a shard knows, against a dict, also where hashes collide."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from buffer.store import known_ids
from buffer.store.known_ids import KnownIds, hash_ids


def strings(numbers) -> pa.StringArray:
    return pa.array([f"id {number}" for number in numbers], pa.string())


@pytest.mark.parametrize("num_hashes", [None, 7])
def test_live_ids_and_those_removed_last_are_known(monkeypatch, num_hashes):
    def hashes(ids: pa.StringArray) -> np.ndarray:
        return hash_ids(ids) if num_hashes is None else hash_ids(ids) % np.uint64(num_hashes) + np.uint64(1)

    monkeypatch.setattr(known_ids, "hash_ids", hashes)
    live: dict[int, int] = {}  # number in the id by row
    removed: list[int] = []
    known = KnownIds(lambda rows: strings(live[row] for row in rows.tolist()), remembered_rows=30)
    generator = np.random.default_rng(0)
    next_row = 0
    for _ in range(60 if num_hashes else 150):
        count = int(generator.integers(1, 12))
        numbers = next_row * 10 + np.arange(count)
        rows = np.arange(next_row, next_row + count)
        known.add(hashes(strings(numbers)), rows)
        live |= dict(zip(rows.tolist(), numbers.tolist(), strict=True))
        next_row += count
        gone = generator.choice(list(live), size=min(int(generator.integers(0, 12)), len(live)), replace=False)
        known.remove(strings(live[row] for row in gone.tolist()), gone)
        removed += [live.pop(row) for row in gone.tolist()]
        asked = [*live.values(), *removed, *(numbers + 1_000_000).tolist()]
        found = dict(zip(asked, known.knows(strings(asked), hashes(strings(asked))).tolist(), strict=True))
        if num_hashes is None:
            assert all(found[number] for number in live.values())
            assert all(found[number] for number in removed[-18:]), "whole removals are forgotten, so some more than 30"
        assert not any(found[number] for number in removed[:-30])
        assert not any(found[number] for number in (numbers + 1_000_000).tolist())


def test_memory_follows_the_live_rows():
    known = KnownIds(lambda rows: strings(rows.tolist()), remembered_rows=100)
    for first in range(0, 100_000, 100):
        rows = np.arange(first, first + 100)
        known.add(hash_ids(strings(rows)), rows)
        known.remove(strings(rows), rows)
    assert len(known._row) <= 4096
    assert not known.knows(strings([5]), hash_ids(strings([5])))[0]


def test_no_ids_are_no_trouble():
    known = KnownIds(lambda rows: strings(rows.tolist()))
    none = pa.array([], pa.string())
    known.add(hash_ids(none), np.empty(0, dtype=np.int64))
    known.remove(pa.array([None], pa.string()), np.array([3]))
    assert known.knows(none, hash_ids(none)).tolist() == []
    assert known.knows(strings([3]), hash_ids(strings([3]))).tolist() == [False]
