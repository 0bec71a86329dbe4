"""The waiting side of the buffer: who waits for whom, and what a time-out says."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from buffer.service.client import SampleTimeoutError, sample_from_shards
from buffer.service.service import ReplayBufferService
from buffer.service.shard import BufferStatus, SampleRequest
from buffer.settings import BufferSettings
from buffer.store.shard import SampleKey
from tests.trajectories import CONTRACT, batch_of, expert_row, fresh_key, ids_of, numbered, row


def run_with_service(folder, scenario, seed=0, **changes):
    """Run `scenario(service)` on an event loop; nothing here may take long."""

    async def run():
        settings = BufferSettings(**{"capacity": 100, "min_size": 1, **changes})
        service = ReplayBufferService(str(folder), CONTRACT, settings, seed)
        try:
            async with asyncio.timeout(30):
                return await scenario(service)
        finally:
            await service.close()

    return asyncio.run(run())


async def drawn(service, count, version, source="policy", timeout_s=60.0, key=None, first_version=0):
    """The result of a new draw, or of the one that `key` names."""
    request = SampleRequest(key or fresh_key(source), count, version, first_version)
    (part,) = await sample_from_shards([service], request, timeout_s)
    return part


async def draw(*arguments, **more):
    """Its rows."""
    return (await drawn(*arguments, **more)).batch


async def started(coroutine):
    """A task that has run up to its first wait."""
    task = asyncio.create_task(coroutine)
    for _ in range(20):
        await asyncio.sleep(0)
    return task


def test_a_draw_waits_until_enough_rows_are_live(tmp_path):
    async def scenario(service):
        task = await started(draw(service, 4, 0, timeout_s=20))
        await service.insert(numbered(0, 3))
        await started(asyncio.sleep(0))
        assert not task.done()
        assert (await service.status()).waiting_samples == 1
        await service.insert(numbered(3, 3))
        assert set(ids_of(await task)) <= {str(number) for number in range(6)}
        assert (await service.status()).waiting_samples == 0

    run_with_service(tmp_path, scenario, min_size=5)


def test_two_draws_wait_side_by_side(tmp_path):
    async def scenario(service):
        policy = await started(draw(service, 2, 0, timeout_s=20))
        expert = await started(draw(service, 1, 0, source="expert", timeout_s=20))
        await service.insert(batch_of([expert_row("e")]))
        assert ids_of(await expert) == ["e"]
        assert not policy.done()
        await service.insert(numbered(0, 2))
        assert len(ids_of(await policy)) == 2

    run_with_service(tmp_path, scenario)


def test_a_time_out_names_whom_it_waited_for(tmp_path):
    async def scenario(service):
        with pytest.raises(SampleTimeoutError, match=r"0 are live and 8 are needed; no actor has inserted anything"):
            await draw(service, 2, 0, timeout_s=0.05)
        await service.insert(batch_of([row("a", actor="actor-7"), row("b", [99], actor="actor-9"), row("c")]))
        with pytest.raises(SampleTimeoutError) as caught:
            await draw(service, 2, 0, timeout_s=0.05)
        message = str(caught.value)
        assert "waited 0.05 s for 2 policy trajectories: 2 are live and 8 are needed" in message
        assert "1 were rejected, the last because: actions holds an id outside" in message
        assert "actor-7 0 s ago" in message
        assert "actor-0 0 s ago" in message
        with pytest.raises(TimeoutError, match="2 expert trajectories: 0 are live"):
            await draw(service, 2, 0, source="expert", timeout_s=0.05)
        assert (await service.status()).waiting_samples == 0

    run_with_service(tmp_path, scenario, min_size=8)


def test_stale_rows_do_not_serve_a_waiting_draw(tmp_path):
    async def scenario(service):
        await service.insert(numbered(0, 10, version=0))
        with pytest.raises(SampleTimeoutError, match=r"0 are live and 1 are needed; 10 were dropped as stale"):
            await draw(service, 1, 5, timeout_s=0.05)
        task = await started(draw(service, 2, 5, timeout_s=20))
        await service.insert(numbered(10, 2, version=2))  # too old already
        await started(asyncio.sleep(0))
        assert not task.done()
        await service.insert(numbered(12, 2, version=3))
        assert set(ids_of(await task)) == {"12", "13"}

    run_with_service(tmp_path, scenario, max_staleness=2)


def test_actors_pause_when_ahead_and_go_on_when_drawn_from(tmp_path):
    async def scenario(service):
        assert not (await service.insert(numbered(0, 5))).pause
        assert await service.wait_for_demand(timeout_s=0)
        assert (await service.insert(numbered(5, 5))).pause
        assert (await service.status()).state == "ahead of the learner"
        assert not await service.wait_for_demand(timeout_s=0.05)
        paused = await started(service.wait_for_demand(timeout_s=20))
        assert not paused.done()
        await draw(service, 3, 0)
        assert await paused
        assert (await service.status()).state == "serving"
        assert not (await service.insert(numbered(10, 2))).pause
        assert (await service.insert(numbered(12, 1))).pause

    run_with_service(tmp_path, scenario, samples_per_insert_tolerance=9)


def test_a_waiting_draw_lifts_the_pause(tmp_path):
    """Everything live may be stale while the actors are ahead: they must not wait for each other."""

    async def scenario(service):
        assert (await service.insert(numbered(0, 10))).pause
        paused = await started(service.wait_for_demand(timeout_s=20))
        task = await started(draw(service, 4, 9, timeout_s=20))
        assert await paused
        assert await service.wait_for_demand(timeout_s=0)
        # Still not served, so the actor is not told to pause again.
        assert not (await service.insert(numbered(10, 2, version=9))).pause
        await service.insert(numbered(12, 2, version=9))
        assert len(ids_of(await task)) == 4

    run_with_service(tmp_path, scenario, samples_per_insert_tolerance=4, max_staleness=0)


def test_draws_wait_beyond_the_samples_per_insert(tmp_path):
    async def scenario(service):
        await service.insert(numbered(0, 4))
        for _ in range(3):
            await draw(service, 2, 0)
        with pytest.raises(
            SampleTimeoutError, match=r"6 were sampled of 4 inserted, and samples_per_insert=1.5 asks for 2 more"
        ):
            await draw(service, 2, 0, timeout_s=0.05)
        task = await started(draw(service, 2, 0, timeout_s=20))
        await service.insert(batch_of([expert_row("e")]))  # counts for nothing here
        await service.insert(numbered(4, 1))
        await started(asyncio.sleep(0))
        assert not task.done()
        await service.insert(numbered(5, 1))
        await task
        await draw(service, 1, 0, source="expert")  # not limited

    run_with_service(tmp_path, scenario, samples_per_insert=1.5, samples_per_insert_tolerance=1.5)


def test_expert_rows_do_not_count_as_ahead(tmp_path):
    async def scenario(service):
        reply = await service.insert(batch_of([expert_row(str(index)) for index in range(20)]))
        assert (reply.accepted, reply.pause) == (20, False)

    run_with_service(tmp_path, scenario, samples_per_insert_tolerance=4)


def test_a_repeated_draw_is_answered_at_once_and_counts_for_nothing(tmp_path):
    """It neither waits for inserts nor lets more of them in: its rows were counted when they were drawn first."""
    keys = [SampleKey("s", step, "policy") for step in range(3)]

    async def first_life(service):
        await service.insert(numbered(0, 4))
        return [ids_of(await draw(service, 2, 0, key=key)) for key in keys[:2]]

    async def second_life(service):
        again = [ids_of(await draw(service, 2, 9, key=key, timeout_s=0)) for key in keys[:2]]
        summary = BufferStatus((await service.status(),)).summary()
        assert "4 policy trajectories live of 4, 4 sampled, 4 sampled again, staleness 0.0" in summary
        with pytest.raises(SampleTimeoutError, match="4 were sampled of 4 inserted"):
            await draw(service, 2, 9, key=keys[2], timeout_s=0.05)
        await service.checkpointed("s", 1)
        with pytest.raises(SampleTimeoutError):
            await draw(service, 2, 9, key=keys[0], timeout_s=0.05)
        assert ids_of(await draw(service, 2, 9, key=keys[1], timeout_s=0)) == again[1]
        return again

    changes = {"samples_per_insert": 1.0, "samples_per_insert_tolerance": 1.0}
    first = run_with_service(tmp_path, first_life, **changes)
    assert run_with_service(tmp_path, second_life, **changes) == first


def test_a_waiting_draw_that_is_asked_for_twice_is_drawn_once(tmp_path):
    """A learner that was stopped leaves its draw waiting; the one after it asks for the same."""
    key = SampleKey("s", 0, "policy")

    async def scenario(service):
        left = await started(draw(service, 4, 0, key=key))
        again = await started(draw(service, 4, 0, key=key))
        await service.insert(numbered(0, 20))
        assert ids_of(await left) == ids_of(await again)
        assert (await service.status()).store.sources["policy"].sampled == 4

    run_with_service(tmp_path, scenario)


def test_summary_is_one_line_for_people(tmp_path):
    async def scenario(service):
        lines = [BufferStatus((await service.status(),)).summary()]
        await service.insert(numbered(0, 10, version=1))
        await service.insert(batch_of([expert_row("e"), row("bad", [99])]))
        await draw(service, 4, 3)
        status = await service.status()
        lines.append(BufferStatus((status,)).summary())
        lines.append(BufferStatus((status, None, status)).summary())
        return lines

    empty, full, sharded = run_with_service(tmp_path, scenario)
    assert empty == "buffer: empty"
    assert "10 policy trajectories live of 10, 4 sampled, staleness 2.0" in full
    assert "1 expert trajectories live of 1" in full
    assert "1 rejected" in full
    assert "20 policy trajectories live of 20, 8 sampled, staleness 2.0" in sharded
    assert "2 rejected; shard 1: does not answer" in sharded


def test_an_insert_that_is_repeated_counts_as_accepted(tmp_path):
    """Its answer was lost, or the process died before it: the actor must not count its rows as refused."""

    async def first_life(service):
        return await service.insert(batch_of([row("a"), row("bad", [99]), row("b")]))

    async def second_life(service):
        again = await service.insert(batch_of([row("a"), row("bad", [99]), row("c")]))
        assert (await service.status()).store.sources["policy"].inserted == 3
        return again

    first = run_with_service(tmp_path, first_life)
    again = run_with_service(tmp_path, second_life)
    assert first.accepted == again.accepted == 2
    assert [each.id for each in first.rejections] == [each.id for each in again.rejections] == ["bad"]


def test_priorities_reach_the_draws(tmp_path):
    async def scenario(service):
        await service.insert(numbered(0, 50))
        first = await drawn(service, 50, 0)
        priorities = np.where(np.isin(ids_of(first.batch), ["7", "8"]), 1.0, 0.0).astype(np.float32)
        await service.update_priorities(first.rows, priorities)
        assert set(ids_of(await draw(service, 2, 0))) == {"7", "8"}

    run_with_service(tmp_path, scenario, sampler="prioritized", priority_exponent=1.0)
