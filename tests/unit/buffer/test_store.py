"""The replay store: capacity, staleness, draws, statistics, segments that come and go."""

from __future__ import annotations

import pytest

from buffer.settings import BufferSettings
from buffer.store.shard import DrawKey
from buffer.store.store import ReplayStore
from tests.stores import SMALL, crash, draw, live_ids, open_store, stored_rows
from tests.trajectories import BORN, CONTRACT, batch_of, expert_row, ids_of, numbered, policy_batch, row


def test_rows_come_back_as_they_were_inserted(tmp_path):
    store = open_store(tmp_path / "b")
    batch = batch_of([row("a", [5, 1, 6]), expert_row("e", [5, 6, 1, 6, 2], realised=[None, 9, None, None, None])])
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
    with pytest.raises(ValueError, match=r"a draw of 21 trajectories can never be served: the buffer holds 20"):
        draw(store, 21, 0)
    with pytest.raises(ValueError, match="source 'critic' is none of expert, policy"):
        draw(store, 1, 0, "critic")
    store.close()


def test_same_seed_same_samples(tmp_path):
    drawn = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        store = open_store(tmp_path / name, seed, segment_bytes=SMALL, sampler="recency", recency_exponent=0.5)
        ids = []
        for step in range(12):
            store.insert(numbered(5 * step, 5))
            ids.append(ids_of(store.draw(DrawKey("s", step, "policy"), 4, 0).batch))
        drawn.append(ids)
        store.close()
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[0], drawn[2], strict=True))


def test_capacity_evicts_the_oldest_of_the_same_source(tmp_path):
    store = open_store(tmp_path / "b", capacity=10)
    store.insert(batch_of([expert_row(f"e{index}") for index in range(6)]))
    store.insert(numbered(0, 25))
    assert live_ids(store) == {str(number) for number in range(15, 25)}
    assert store.num_live("expert") == 6
    store.insert(batch_of([expert_row(f"f{index}") for index in range(6)]))
    assert live_ids(store, "expert") == {"e2", "e3", "e4", "e5", *(f"f{index}" for index in range(6))}
    counters = store.status().sources["policy"]
    assert (counters.inserted, counters.live, counters.removed) == (25, 10, {"capacity": 15})
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


def test_experts_are_never_stale(tmp_path):
    store = open_store(tmp_path / "b", max_staleness=0)
    store.insert(batch_of([expert_row("e")]))
    assert draw(store, 1, 1000, "expert").num_rows == 1
    store.close()


def test_statistics_of_a_draw(tmp_path):
    now_s = BORN.timestamp() + 8.0
    store = ReplayStore(tmp_path / "b", CONTRACT, BufferSettings(min_size=1), seed=0, clock=lambda: now_s)
    store.insert(batch_of([row("a", [5], policy_version=[1]), row("b", [5, 6], policy_version=[4, 6])]))
    draw(store, 2, 7)
    found = store.status().sources["policy"].last_draw
    assert (found.staleness_mean, found.staleness_max) == (4.5, 6)
    assert (found.age_mean_s, found.age_max_s) == (8.0, 8.0)
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


def test_full_segments_are_sealed_mapped_and_deleted_once_dead(tmp_path):
    folder = tmp_path / "b"
    store = open_store(folder, segment_bytes=SMALL)
    most = 0
    for step in range(60):
        store.insert(numbered(5 * step, 5))
        most = max(most, len(list(folder.glob("segment-*"))))
        assert draw(store, 20 if step >= 3 else 5 * (step + 1), 0) is not None
    assert most <= 4
    status = store.status()
    assert status.sources["policy"].inserted == 300
    assert status.size_bytes < 5 * SMALL
    assert len(list(folder.glob("segment-*.arrows"))) == status.sealed_segments + 1
    assert stored_rows(folder)[-20:] == list(range(280, 300))
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


def test_rows_of_another_stage_are_not_drawn_not_even_those_that_come_in_late(tmp_path):
    store = open_store(tmp_path / "b", max_staleness=None)
    store.insert(numbered(0, 3, version=4))
    store.begin_stage(5)
    store.insert(numbered(3, 2, version=4))
    assert draw(store, 1, 5) is None
    store.insert(numbered(5, 2, version=5))
    batch = draw(store, 2, 5)
    assert {versions[0] for versions in batch.column("policy_version").to_pylist()} == {5}
    copy = open_store(crash(tmp_path / "b", tmp_path / "c"), max_staleness=None)
    assert copy.num_live("policy") == 2
    copy.close()
    store.close()
