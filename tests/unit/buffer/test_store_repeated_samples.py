"""Draws that are repeated: the same rows, whatever happened to them; new draws that depend on nothing but their key."""

from __future__ import annotations

import os

import pytest

from buffer.store.shard import SampleKey
from tests.stores import SMALL, crash, live_ids, open_store
from tests.trajectories import batch_of, expert_row, ids_of, numbered

KEY = SampleKey("stage", 0, "policy")


def test_pinned_segments_are_deleted_after_the_checkpoint(tmp_path):
    store = open_store(tmp_path / "b", segment_bytes=SMALL)
    store.insert(numbered(0, 20))
    store.sample(KEY, 6, 0)
    for first in range(20, 200, 10):
        store.insert(numbered(first, 10))
    first_segment = tmp_path / "b" / "segment-000001.arrows"
    assert first_segment.exists()
    store.checkpointed("stage", 0)
    assert first_segment.exists(), "the checkpoint is from before the draw"
    store.checkpointed("stage", 1)
    assert not first_segment.exists()
    assert not store.num_logged(KEY)
    store.close()


def test_a_repeated_draw_asks_neither_for_freshness_nor_for_a_minimal_size(tmp_path):
    store = open_store(tmp_path / "b", max_staleness=1, min_size=8)
    store.insert(numbered(0, 8, version=3))
    drawn = store.sample(KEY, 4, 4)
    folder = crash(tmp_path / "b", tmp_path / "c")
    store.close()
    store = open_store(folder, max_staleness=1, min_size=8)
    store.begin_stage(50)
    assert store.sample(SampleKey("stage", 1, "policy"), 4, 90) is None, "all rows are stale now"
    again = store.sample(KEY, 4, 91)
    assert again.batch.equals(drawn.batch)
    assert again.policy_version == 4, "staleness is what it was when the rows were drawn"
    found = store.status().sources["policy"]
    assert (found.sampled, found.replayed, found.dropped_stale) == (4, 4, 8)
    assert found.last_sample.staleness_mean == 1.0
    assert store.newest_version == 90, "a repeated draw tells nothing about versions"
    store.close()


def test_a_new_draw_depends_on_seed_key_and_contents_alone(tmp_path):
    """Not on how many draws came before it, nor on whether the store was opened anew."""
    batch = batch_of([*(expert_row(f"e{number}") for number in range(20))])

    def drawn(name, *steps, seed=0, stage="stage", source="policy"):
        store = open_store(tmp_path / name, seed)
        store.insert(numbered(0, 20))
        store.insert(batch)
        results = [store.sample(SampleKey(stage, step, source), 8, 0).batch for step in steps]
        store.close()
        return ids_of(results[-1])

    expected = drawn("a", 5)
    assert drawn("b", 0, 1, 2, 5) == expected
    others = [
        drawn("c", 6),
        drawn("d", 5, seed=1),
        drawn("e", 5, stage="other"),
        [id_.removeprefix("e") for id_ in drawn("f", 5, source="expert")],
    ]
    assert all(other != expected for other in others)


def test_a_logged_draw_is_repeated_whatever_the_capacity_is_now(tmp_path):
    store = open_store(tmp_path / "b")
    store.insert(numbered(0, 20))
    drawn = store.sample(KEY, 6, 0)
    store.close()
    store = open_store(tmp_path / "b", capacity=4)
    assert store.sample(KEY, 6, 0).batch.equals(drawn.batch)
    with pytest.raises(ValueError, match="a sample of 6 trajectories can never be served: the buffer holds 4"):
        store.sample(SampleKey("stage", 1, "policy"), 6, 0)
    store.close()


def test_a_draw_whose_rows_were_lost_is_drawn_anew_for_good(tmp_path, caplog):
    store = open_store(tmp_path / "b", capacity=1000, segment_bytes=SMALL)
    store.insert(numbered(0, 10))
    store.sample(KEY, 10, 0)
    while store.status().sealed_segments < 1:
        store.insert(numbered(store.next_row, 10))
    store.insert(numbered(5000, 1))
    for step in range(1, 100):
        kept = SampleKey("stage", step, "policy")
        if "5000" in ids_of(store.sample(kept, 1, 0).batch):
            break
    else:
        raise AssertionError("no draw of the row in the open segment")
    store.close()
    os.truncate(tmp_path / "b" / "segment-000001.arrows", 100)
    for _ in range(2):
        store = open_store(tmp_path / "b", capacity=1000, segment_bytes=SMALL)
        assert not store.num_logged(KEY)
        assert ids_of(store.sample(kept, 1, 0).batch) == ["5000"]
        store.close()
    assert caplog.text.count("step=0, source='policy') are lost; on resume that step samples others") == 1
    store = open_store(tmp_path / "b", capacity=1000, segment_bytes=SMALL)
    (number,) = map(int, ids_of(store.sample(KEY, 1, 0).batch))
    assert number >= 10, "those before were lost"
    store.close()


def test_rows_lost_with_the_power_are_accounted_for_and_their_numbers_not_given_again(tmp_path):
    """Without fsync a loss of power may take the open segment's last rows and leave what the log says of them."""
    store = open_store(tmp_path / "b", fsync="none")
    store.insert(numbered(0, 5))
    before = (tmp_path / "b" / "segment-000001.arrows").read_bytes()
    store.insert(numbered(5, 5))
    store.sample(KEY, 10, 0)
    folder = crash(tmp_path / "b", tmp_path / "c")
    store.close()
    (folder / "segment-000001.arrows").write_bytes(before)
    for _ in range(2):
        store = open_store(folder, fsync="none")
        assert not store.num_logged(KEY)
        assert store.next_row == 10
        assert live_ids(store) == {"0", "1", "2", "3", "4"}
        counters = store.status().sources["policy"]
        assert (counters.inserted, counters.live, counters.removed) == (10, 5, {"quarantine": 5})
        store.close()
    store = open_store(folder, fsync="none")
    assert store.insert(numbered(5, 5)).accepted == 5, "they are not there, so they may come again"
    assert store.next_row == 15
    store.close()


def test_the_part_of_a_shard_is_completed_after_an_interruption(tmp_path):
    """Of a draw of 12 rows over several shards this one has logged 4, and is asked for 7 now."""
    store = open_store(tmp_path / "b")
    store.insert(numbered(0, 20))
    first = store.sample(KEY, 4, 0, whole=12)
    assert store.num_logged(KEY) == 4
    store.insert(numbered(20, 6))  # which evicts 0 to 5
    still_live = [id_ for id_ in ids_of(first.batch) if int(id_) >= 6]
    assert 0 < len(still_live) < 4
    folder = crash(tmp_path / "b", tmp_path / "c")
    parts = []
    for each in (store, open_store(folder)):
        assert each.num_available(KEY, 12, 0) == 20 - len(still_live)
        whole = each.sample(KEY, 7, 0, whole=12)
        assert not whole.repeated
        assert ids_of(whole.batch)[:4] == ids_of(first.batch)
        assert len(set(ids_of(whole.batch))) == 7
        again = each.sample(KEY, 7, 0, whole=12)
        assert again.repeated
        assert again.batch.equals(whole.batch)
        parts.append(ids_of(whole.batch))
        with pytest.raises(ValueError, match=r"sampled 12 policy trajectories .* asks for 13 now"):
            each.sample(KEY, 7, 0, whole=13)
        with pytest.raises(ValueError, match=r"sampled 7 policy trajectories .* asks for 5 now"):
            each.sample(KEY, 5, 0, whole=12)
        assert each.status().sources["policy"].sampled == each.counters("policy").sampled
        each.close()
    assert parts[0] == parts[1]
    store = open_store(folder)
    assert ids_of(store.sample(KEY, 7, 0, whole=12).batch) == parts[1]
    store.close()
