"""The replay store: capacity, staleness, draws, statistics, segments that come and go."""

from __future__ import annotations

import pytest

from buffer.settings import BufferSettings
from buffer.store.store import ReplayStore
from tests.stores import SMALL, draw, live_ids, open_store
from tests.trajectories import BORN, CONTRACT, batch_of, expert_row, ids_of, numbered, policy_batch, row


def test_rows_come_back_as_they_were_inserted(tmp_path):
    store = open_store(tmp_path / "b")
    batch = batch_of([row("a", [5, 1, 6]), expert_row("e", [5, 6, 1, 6, 2], executed=[None, 9, None, None, None])])
    assert store.insert(batch).accepted == 2
    assert draw(store, 1, 0).equals(batch.slice(0, 1))
    assert draw(store, 1, 0, "expert").equals(batch.slice(1, 1))
    assert draw(store, 1, 0).schema.equals(batch.schema, check_metadata=True)
    store.close()


def test_draws_have_no_repetition_and_wait_for_enough(tmp_path):
    store = open_store(tmp_path / "b", min_size=10)
    store.insert(numbered(0, 9))
    assert draw(store, 3, 0) is None, "min_size before the first draw"
    store.insert(numbered(9, 1))
    assert len(set(ids_of(draw(store, 10, 0)))) == 10
    assert draw(store, 11, 0) is None
    with pytest.raises(ValueError, match=r"a sample of 21 trajectories can never be served: the buffer holds 20"):
        draw(store, 21, 0)
    with pytest.raises(ValueError, match="source 'critic' is none of expert, policy"):
        draw(store, 1, 0, "critic")
    store.close()


def test_no_drawn_row_is_too_stale_and_drops_are_for_good(tmp_path):
    store = open_store(tmp_path / "b", max_staleness=2)
    rows = [row(f"{low}-{high}", [5, 6], policy_version=[high, low]) for low in range(4) for high in range(low, 4)]
    store.insert(batch_of(rows))
    draw(store, 1, 0)
    assert live_ids(store) == {"1-1", "1-2", "1-3", "2-2", "2-3", "3-3"}, "version 3 was seen, so 0 is too old"
    assert set(ids_of(draw(store, 3, 4))) == {"2-2", "2-3", "3-3"}
    counters = store.status().sources["policy"]
    assert (counters.live, counters.removed) == (3, {"stale": 7})
    # A caller that knows less than the buffer does not bring rows back.
    store.insert(batch_of([row("late", [5], policy_version=[1])]))
    assert draw(store, 4, 0) is None
    assert store.status().sources["policy"].dropped_stale == 8
    store.close()


def test_statistics_of_a_draw(tmp_path):
    now_s = BORN.timestamp() + 8.0
    store = ReplayStore(tmp_path / "b", CONTRACT, BufferSettings(min_size=1), seed=0, clock=lambda: now_s)
    store.insert(batch_of([row("a", [5], policy_version=[1]), row("b", [5, 6], policy_version=[4, 6])]))
    draw(store, 2, 7)
    found = store.status().sources["policy"].last_sample
    assert (found.staleness_mean, found.age_mean_s) == (4.5, 8.0)
    store.close()


def test_rejections_name_rows_of_the_batch_as_sent_and_leave_out_what_is_stored(tmp_path):
    store = open_store(tmp_path / "b")
    store.insert(policy_batch(["a", "b"]))
    result = store.insert(batch_of([row("c", [99]), row("a"), row("d"), row("d"), row("b")]))
    assert (result.accepted, result.present) == (1, 2)
    assert [(rejection.row, rejection.id) for rejection in result.rejections] == [(0, "c"), (3, "d")]
    assert store.status().rejected == 2, "what is stored already was not refused"
    assert live_ids(store) == {"a", "b", "d"}
    store.close()


def test_a_drawn_batch_outlives_the_deletion_of_its_segment(tmp_path):
    store = open_store(tmp_path / "b", segment_bytes=SMALL)
    store.insert(numbered(0, 20))
    drawn = draw(store, 20, 0)
    before = drawn.to_pylist()
    for step in range(1, 20):
        store.insert(numbered(20 * step, 20))
    assert drawn.to_pylist() == before
    store.close()
