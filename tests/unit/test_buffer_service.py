"""The waiting side of the buffer: who waits for whom, and what a time-out says."""

from __future__ import annotations

import asyncio

import pytest

from buffer.service import DrawTimeoutError, ReplayBufferService
from buffer.settings import BufferSettings
from tests.trajectories import CONTRACT, batch_of, expert_row, ids_of, numbered, row


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


async def started(coroutine):
    """A task that has run up to its first wait."""
    task = asyncio.create_task(coroutine)
    for _ in range(5):
        await asyncio.sleep(0)
    return task


def test_a_draw_waits_until_enough_rows_are_live(tmp_path):
    async def scenario(service):
        task = await started(service.draw(4, 0, timeout_s=20))
        await service.insert(numbered(0, 3))
        await started(asyncio.sleep(0))
        assert not task.done()
        assert (await service.status()).waiting_draws == 1
        await service.insert(numbered(3, 3))
        assert set(ids_of(await task)) <= {str(number) for number in range(6)}
        assert (await service.status()).waiting_draws == 0

    run_with_service(tmp_path, scenario, min_size=5)


def test_two_draws_wait_side_by_side(tmp_path):
    async def scenario(service):
        policy = await started(service.draw(2, 0, timeout_s=20))
        expert = await started(service.draw(1, 0, source="expert", timeout_s=20))
        await service.insert(batch_of([expert_row("e")]))
        assert ids_of(await expert) == ["e"]
        assert not policy.done()
        await service.insert(numbered(0, 2))
        assert len(ids_of(await policy)) == 2

    run_with_service(tmp_path, scenario)


def test_a_time_out_names_whom_it_waited_for(tmp_path):
    async def scenario(service):
        with pytest.raises(DrawTimeoutError, match=r"0 are live and 8 are needed; no actor has inserted anything"):
            await service.draw(2, 0, timeout_s=0.05)
        await service.insert(batch_of([row("a", actor="actor-7"), row("b", [99], actor="actor-9"), row("c")]))
        with pytest.raises(DrawTimeoutError) as caught:
            await service.draw(2, 0, timeout_s=0.05)
        message = str(caught.value)
        assert "waited 0.05 s for 2 policy trajectories: 2 are live and 8 are needed" in message
        assert "1 were rejected, the last because: actions holds an id outside" in message
        assert "actor-7 0 s ago" in message
        assert "actor-0 0 s ago" in message
        with pytest.raises(TimeoutError, match="2 expert trajectories: 0 are live"):
            await service.draw(2, 0, source="expert", timeout_s=0.05)
        assert (await service.status()).waiting_draws == 0

    run_with_service(tmp_path, scenario, min_size=8)


def test_stale_rows_do_not_serve_a_waiting_draw(tmp_path):
    async def scenario(service):
        await service.insert(numbered(0, 10, version=0))
        with pytest.raises(DrawTimeoutError, match=r"0 are live and 1 are needed; 10 were dropped as stale"):
            await service.draw(1, 5, timeout_s=0.05)
        task = await started(service.draw(2, 5, timeout_s=20))
        await service.insert(numbered(10, 2, version=2))  # too old already
        await started(asyncio.sleep(0))
        assert not task.done()
        await service.insert(numbered(12, 2, version=3))
        assert set(ids_of(await task)) == {"12", "13"}

    run_with_service(tmp_path, scenario, max_staleness=2)


def test_a_draw_that_can_never_be_served_fails_at_once(tmp_path):
    async def scenario(service):
        with pytest.raises(ValueError, match=r"raise buffer\.capacity"):
            await service.draw(101, 0, timeout_s=1000)
        assert (await service.status()).waiting_draws == 0

    run_with_service(tmp_path, scenario)


def test_actors_pause_when_ahead_and_go_on_when_drawn_from(tmp_path):
    async def scenario(service):
        assert not (await service.insert(numbered(0, 5))).pause
        assert await service.wait_for_demand(timeout_s=0)
        assert (await service.insert(numbered(5, 5))).pause
        assert not await service.wait_for_demand(timeout_s=0.05)
        paused = await started(service.wait_for_demand(timeout_s=20))
        assert not paused.done()
        await service.draw(3, 0)
        assert await paused
        assert (await service.status()).inserts_ahead == 7
        assert not (await service.insert(numbered(10, 2))).pause
        assert (await service.insert(numbered(12, 1))).pause

    run_with_service(tmp_path, scenario, max_inserts_ahead=10)


def test_a_waiting_draw_lifts_the_pause(tmp_path):
    """Everything live may be stale while the actors are ahead: they must not wait for each other."""

    async def scenario(service):
        assert (await service.insert(numbered(0, 10))).pause
        paused = await started(service.wait_for_demand(timeout_s=20))
        task = await started(service.draw(4, 9, timeout_s=20))
        assert await paused
        assert await service.wait_for_demand(timeout_s=0)
        # Still not served, so the actor is not told to pause again.
        assert not (await service.insert(numbered(10, 2, version=9))).pause
        await service.insert(numbered(12, 2, version=9))
        assert len(ids_of(await task)) == 4

    run_with_service(tmp_path, scenario, max_inserts_ahead=5, max_staleness=0)


def test_draws_wait_beyond_the_samples_per_insert(tmp_path):
    async def scenario(service):
        await service.insert(numbered(0, 4))
        for _ in range(3):
            await service.draw(2, 0)
        with pytest.raises(DrawTimeoutError, match=r"6 were drawn of 4 inserted, and max_samples_per_insert=1.5 asks"):
            await service.draw(2, 0, timeout_s=0.05)
        task = await started(service.draw(2, 0, timeout_s=20))
        await service.insert(batch_of([expert_row("e")]))  # counts for nothing here
        await service.insert(numbered(4, 1))
        await started(asyncio.sleep(0))
        assert not task.done()
        await service.insert(numbered(5, 1))
        await task
        await service.draw(1, 0, source="expert")  # not limited

    run_with_service(tmp_path, scenario, max_samples_per_insert=1.5)


def test_expert_rows_do_not_count_as_ahead(tmp_path):
    async def scenario(service):
        reply = await service.insert(batch_of([expert_row(str(index)) for index in range(20)]))
        assert (reply.accepted, reply.pause) == (20, False)

    run_with_service(tmp_path, scenario, max_inserts_ahead=5)


def test_same_seed_and_inserts_same_samples_and_new_ones_after_reopening(tmp_path):
    async def scenario(service):
        await service.insert(numbered((await service.status()).store.sources["policy"].inserted, 50))
        return [ids_of(await service.draw(5, 0)) for _ in range(3)]

    first = run_with_service(tmp_path / "a", scenario)
    assert first == run_with_service(tmp_path / "b", scenario)
    assert first != run_with_service(tmp_path / "c", scenario, seed=1)

    async def draw_only(service):
        return [ids_of(await service.draw(5, 0)) for _ in range(3)]

    assert run_with_service(tmp_path / "a", draw_only) != first


def test_summary_is_one_line_for_people(tmp_path):
    async def scenario(service):
        lines = [(await service.status()).summary()]
        await service.insert(numbered(0, 10, version=1))
        await service.insert(batch_of([expert_row("e"), row("bad", [99])]))
        await service.draw(4, 3)
        lines.append((await service.status()).summary())
        return lines

    empty, full = run_with_service(tmp_path, scenario)
    assert empty == "buffer: empty"
    assert "10 policy trajectories live of 10, 4 drawn, staleness 2.0" in full
    assert "1 expert trajectories live of 1" in full
    assert "1 rejected" in full
