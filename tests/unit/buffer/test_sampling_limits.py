"""How often a row may be drawn, through a store on disk: a queue, a limit over a crash, a limit that was lowered."""

from __future__ import annotations

from collections import Counter

import pytest

from buffer.store.shard import SampleKey
from tests.stores import crash, open_store
from tests.trajectories import ids_of, numbered


def sampled_ids(store, step, count):
    result = store.sample(SampleKey("s", step, "policy"), count, 0)
    return None if result is None else ids_of(result.batch)


def test_a_queue_gives_everything_once_and_in_order_also_over_a_crash(tmp_path):
    settings = {"sampler": "fifo", "max_times_sampled": 1, "segment_bytes": 4_000, "fsync": "none"}
    store = open_store(tmp_path / "0", **settings)
    given = []
    for step in range(6):
        store.insert(numbered(3 * step, 3))
        given.append(sampled_ids(store, step, 2))
        store = open_store(crash(tmp_path / str(step), tmp_path / str(step + 1)), **settings)
        assert sampled_ids(store, step, 2) == given[-1], "a repeated draw"
    assert [name for pair in given for name in pair] == [str(number) for number in range(12)]
    counters = store.status().sources["policy"]
    assert (counters.live, counters.removed, counters.sampled) == (6, {"sampled": 12}, 12)
    assert sampled_ids(store, 6, 7) is None


@pytest.mark.parametrize("sampler", ["uniform", "recency", "prioritized", "stratified"])
def test_no_row_is_drawn_more_often_than_it_may_be(tmp_path, sampler):
    store = open_store(tmp_path / "b", sampler=sampler, max_times_sampled=3, fsync="none")
    store.insert(numbered(0, 20))
    times = Counter()
    step = 0
    while (drawn := sampled_ids(store, step, 4)) is not None:
        times.update(drawn)
        step += 1
        if step == 7:
            store.close()
            store = open_store(tmp_path / "b", sampler=sampler, max_times_sampled=3, fsync="none")
    assert max(times.values()) == 3
    counters = store.status().sources["policy"]
    assert counters.live < 4, "the rest is too little for another draw"
    assert counters.removed == {"sampled": 20 - counters.live}
