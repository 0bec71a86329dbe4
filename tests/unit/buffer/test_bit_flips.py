"""Bits that flip in the files of a shard: seen, named and put aside, and no row is ever answered with other values."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.store.catalog import CorruptStoreError
from tests.stores import draw, open_store
from tests.trajectories import batch_of, expert_row, fresh_key, numbered

SMALL = {"capacity": 24, "segment_bytes": 6_000, "max_staleness": 3}
FILES = ("catalog.db", "segment-*.arrows")


def contents(store):
    """Live rows by id."""
    found = {}
    for source in ("policy", "expert"):
        if count := store.num_live(source):
            found |= {row["id"]: row for row in draw(store, count, store.newest_version, source).to_pylist()}
    return found


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A folder with sealed segments, an open one and every common event in the log; and its live rows."""
    folder = tmp_path_factory.mktemp("pristine") / "shard-000"
    store = open_store(folder, **SMALL)
    rows = {}
    for number in range(9):
        batch = numbered(number * 6, 6, version=number // 2)
        experts = batch_of([expert_row(f"expert-{number}-{index}") for index in range(2)])
        for each in (batch, experts):
            store.insert(each)
            rows |= {row["id"]: row for row in each.to_pylist()}
        if number % 2:
            key = fresh_key()
            store.sample(key, 4, number // 2)
            store.checkpointed(key.stage, key.step)
    store.close()
    copy = shutil.copytree(folder, folder.with_name("copy"))
    store = open_store(copy, **SMALL)
    assert store.status().sealed_segments >= 2
    live = contents(store)
    store.close()
    assert set(live) < set(rows), "some were evicted or dropped"
    assert all(rows[id_] == row for id_, row in live.items())
    return folder, rows, set(live)


@pytest.mark.parametrize("pattern", FILES)
@settings(max_examples=60, deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 7)), min_size=1, max_size=3), which=st.integers(0, 9)
)
def test_flipped_bits_are_named_and_no_row_is_changed(pristine, tmp_path_factory, pattern, flips, which):
    pristine_folder, rows, live = pristine
    folder = shutil.copytree(pristine_folder, tmp_path_factory.mktemp("flipped") / "shard-000")
    files = sorted(folder.glob(pattern))
    path = files[which % len(files)]
    content = bytearray(path.read_bytes())
    before = bytes(content)
    for position, bit in flips:
        content[position % len(content)] ^= 1 << bit
    path.write_bytes(content)
    try:
        store = open_store(folder, **SMALL)
    except CorruptStoreError as error:
        if path.name not in str(error):
            raise
        assert not path.name.startswith("segment"), "a damaged segment stops nobody"
        return
    status = store.status()
    found = contents(store)
    store.close()
    shutil.rmtree(folder)
    assert all(rows[id_] == row for id_, row in found.items())
    for counters in status.sources.values():
        assert counters.inserted == counters.live + sum(counters.removed.values())
    if set(found) != live:
        assert content != before
        assert any(name.startswith(path.name) for name in status.quarantined)
