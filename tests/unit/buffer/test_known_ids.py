"""Which ids a shard knows, against plain lists."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from buffer.store import known_ids
from buffer.store.known_ids import KnownIds, hash_ids

NONE = np.empty(0, np.uint64)


def hashes(numbers) -> np.ndarray:
    return hash_ids(pa.array([f"id {number}" for number in numbers], pa.string()))


@pytest.mark.parametrize("most_recent", [10, 100_000])
def test_stored_ids_and_those_deleted_last_are_known(monkeypatch, most_recent):
    monkeypatch.setattr(known_ids, "_MOST_RECENT", most_recent)
    monkeypatch.setattr(known_ids, "REMEMBERED_ROWS", 30)
    stored: list[int] = []
    deleted: list[int] = []
    known = KnownIds(lambda: hashes(stored), NONE)
    generator = np.random.default_rng(0)
    for step in range(100):
        new = range(100 * step, 100 * step + int(generator.integers(1, 12)))
        assert not known.knows(hashes(new)).any()
        stored += new
        known.add(hashes(new))
        gone = generator.choice(stored, size=min(int(generator.integers(0, 12)), len(stored)), replace=False).tolist()
        stored = [number for number in stored if number not in gone]
        deleted += gone
        known.delete(hashes(gone))
        assert known.knows(hashes(stored)).all()
        assert known.knows(hashes(deleted[-30:])).all()
    if most_recent == 10:
        assert not known.knows(hashes(deleted[:-60])).any(), "older ones are forgotten"
    reopened = KnownIds(lambda: hashes(stored), hashes(deleted))
    assert reopened.knows(hashes([*stored, *deleted[-30:]])).all()
    assert not reopened.knows(hashes(deleted[:-30])).any()


def test_no_ids_are_no_trouble():
    known = KnownIds(lambda: NONE, NONE)
    known.add(NONE)
    assert known.knows(NONE).tolist() == []
    assert known.knows(hashes([3])).tolist() == [False]
