"""Which ids a shard knows, against plain lists."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from buffer.store import table
from buffer.store.catalog import FACTS
from buffer.store.table import NOT_STORED, KnownIds, ReplayTable, hash_ids

NONE = np.empty(0, np.uint64)


def hashes(numbers) -> np.ndarray:
    return hash_ids(pa.array([f"id {number}" for number in numbers], pa.string()))


@pytest.mark.parametrize("most_recent", [10, 100_000])
def test_stored_ids_and_those_deleted_last_are_known(monkeypatch, most_recent):
    monkeypatch.setattr(table, "_MOST_RECENT_IDS", most_recent)
    monkeypatch.setattr(table, "REMEMBERED_ROWS", 30)
    rows = ReplayTable()
    stored: list[int] = []
    deleted: list[int] = []
    known = KnownIds(rows, NONE)
    generator = np.random.default_rng(0)
    for _ in range(100):
        first = len(stored) + len(deleted)
        new = np.arange(first, first + int(generator.integers(1, 12)))
        assert not known.knows(hashes(new)).any()
        facts = np.zeros(len(new), FACTS)
        facts["hash"] = hashes(new)
        rows.add(new, facts, 1)
        stored += new.tolist()
        known.add(hashes(new))
        gone = generator.choice(stored, size=min(int(generator.integers(0, 12)), len(stored)), replace=False)
        rows.move(gone, NOT_STORED)
        stored = [number for number in stored if number not in gone]
        deleted += gone.tolist()
        known.delete(hashes(gone))
        assert known.knows(hashes(stored)).all()
        assert known.knows(hashes(deleted[-30:])).all()
    if most_recent == 10:
        assert not known.knows(hashes(deleted[:-60])).any(), "older ones are forgotten"
    reopened = KnownIds(rows, hashes(deleted))
    assert reopened.knows(hashes([*stored, *deleted[-30:]])).all()
    assert not reopened.knows(hashes(deleted[:-30])).any()
