"""The limiter in random histories: the bounds hold, and the two sides never wait for each other."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from buffer.settings import BufferSettings
from buffer.store.limiter import Limiter
from buffer.store.shard import SourceCounters

LARGE = 10_000


def rows(inserted, sampled, live):
    return SourceCounters(inserted=inserted, sampled=sampled, live=live)


def limiter(**changes):
    return Limiter(BufferSettings(**{"capacity": LARGE, "min_size": 1, **changes}))


@settings(deadline=None, max_examples=200)
@given(
    ratio=st.sampled_from([0.1, 0.5, 1.0, 1.5, 4.0, 7.3]),
    min_size=st.integers(1, 20),
    count=st.integers(1, 16),
    spare=st.sampled_from([0.0, 0.5, 3.0, 20.0]),
    turns=st.lists(st.booleans(), min_size=60, max_size=60),
)
def test_bounds_hold_and_one_side_can_always_go_on(ratio, min_size, count, spare, turns):
    tolerance = (count + ratio) / 2 + spare
    chosen = limiter(samples_per_insert=ratio, samples_per_insert_tolerance=tolerance, min_size=min_size)
    chosen.check(count)
    inserted = sampled = 0
    for actors_turn in turns:
        traffic = rows(inserted, sampled, live=inserted)
        can_insert, can_sample = chosen.wants_inserts(traffic), chosen.allowance(traffic) >= count
        assert can_insert or can_sample
        assert can_insert or inserted >= min_size, "the first draw is not kept from its rows"
        if can_insert and (actors_turn or not can_sample):
            inserted += 1
        else:
            sampled += count
        balance = ratio * (inserted - min_size) - sampled
        assert balance <= tolerance + 1e-9
        assert balance >= -tolerance - 1e-9 or sampled == 0  # below before the first draw, for want of rows


@given(
    ratio=st.sampled_from([0.3, 1.0, 2.5]),
    count=st.integers(1, 50),
    inserted=st.integers(0, 99),
    sampled=st.integers(0, 99),
)
def test_as_many_inserts_as_it_says_are_needed(ratio, count, inserted, sampled):
    chosen = limiter(samples_per_insert=ratio, samples_per_insert_tolerance=30.0, min_size=5)
    needed = chosen.inserts_needed(count, rows(inserted, sampled, inserted))
    assert chosen.allowance(rows(inserted + needed, sampled, inserted)) >= count
    assume(needed)
    assert chosen.allowance(rows(inserted + needed - 1, sampled, inserted)) < count


def test_a_tolerance_with_no_room_for_a_draw_is_refused_with_the_smallest_that_has():
    tight = {"samples_per_insert": 2.0, "min_size": 4}
    with pytest.raises(
        ValueError, match=r"tolerance of 8 samples\. Set buffer\.samples_per_insert_tolerance to 17 or more"
    ):
        limiter(**tight).check(32)
    limiter(**tight, samples_per_insert_tolerance=17.0).check(32)
    with pytest.raises(ValueError, match="to 17 or more"):
        limiter(**tight, samples_per_insert_tolerance=16.9).check(32)
    with pytest.raises(ValueError, match="to 20 or more"):
        limiter(**tight, samples_per_insert_tolerance=17.0, shards=4).check(32)
    limiter().check(32)  # no ratio, no bounds for draws


def test_the_default_tolerance_never_draws_more_than_the_ratio_allows_of_what_was_inserted():
    chosen = limiter(samples_per_insert=2.0, min_size=10)
    assert chosen.allowance(rows(10, 0, 10)) == 20
    assert chosen.allowance(rows(10, 30, 10)) == 0
    assert chosen.wants_inserts(rows(19, 0, 19))
    assert not chosen.wants_inserts(rows(20, 0, 20))


def test_without_a_ratio_actors_pause_when_the_buffer_is_full_of_what_was_never_drawn():
    chosen = limiter(capacity=100, min_size=10)
    assert chosen.allowance(rows(50, 10_000, 50)) >= 50
    assert chosen.wants_inserts(rows(99, 0, 99))
    assert not chosen.wants_inserts(rows(150, 50, 100))
    assert chosen.wants_inserts(rows(150, 51, 100))


def test_what_left_the_buffer_unused_does_not_keep_actors_paused():
    chosen = limiter(samples_per_insert=1.0, min_size=10)
    assert not chosen.wants_inserts(rows(500, 400, 30))
    assert chosen.wants_inserts(rows(500, 400, 19)), "the others were dropped as stale"
