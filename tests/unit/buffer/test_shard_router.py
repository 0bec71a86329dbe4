"""Draws from several shards: in proportion, repeated exactly, completed after a crash, held up by no single shard."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from buffer.service.client import SampleTimeoutError, sample_from_shards
from buffer.service.service import ReplayBufferService
from buffer.service.shard import SampleRequest, shard_folder, shard_seed, shard_settings
from buffer.settings import BufferSettings
from buffer.store.shard import SampleKey
from tests.trajectories import CONTRACT, ids_of, numbered

KEY = SampleKey("s", 0, "policy")


def run_with_shards(folder, num_shards, scenario, **changes):
    """Run `scenario(services)` on an event loop: one life of a buffer."""

    async def run():
        settings = BufferSettings(**{"shards": num_shards, "capacity": 100 * num_shards, "min_size": 1, **changes})
        services = [
            ReplayBufferService(
                str(shard_folder(folder, index)), CONTRACT, shard_settings(settings, index), shard_seed(0, index)
            )
            for index in range(num_shards)
        ]
        try:
            async with asyncio.timeout(30):
                return await scenario(services)
        finally:
            for service in services:
                await service.close()

    return asyncio.run(run())


async def draw(shards, count, version=0, key=KEY, timeout_s=20.0, first_version=0):
    """The ids of each shard's part, in order."""
    parts = await sample_from_shards(shards, SampleRequest(key, count, version, first_version), timeout_s)
    return [[] if part is None else ids_of(part.batch) for part in parts]


async def drawn_by_each(services):
    return [(await service.status()).store.sources["policy"].sampled for service in services]


async def started(coroutine):
    """A task that has run up to its first wait."""
    task = asyncio.create_task(coroutine)
    for _ in range(20):
        await asyncio.sleep(0)
    return task


class ShardLostError(Exception):
    """Stands for the end of a process."""


@dataclass
class DyingShard:
    """A shard whose process ends when it is asked to take its part: before that, or before its answer is sent."""

    service: ReplayBufferService
    takes_first: bool

    def __getattr__(self, name):
        return getattr(self.service, name)

    async def sample(self, *arguments):
        if self.takes_first:
            await self.service.sample(*arguments)
        raise ShardLostError


def test_parts_are_in_proportion_to_live_rows_and_repeated_in_the_next_life(tmp_path):
    keys = [SampleKey("s", step, "policy") for step in range(5)]

    async def first_life(services):
        for service, first, count in zip(services, (0, 100, 200), (60, 30, 10), strict=True):
            await service.insert(numbered(first, count))
        return [await draw(services, 20, key=key) for key in keys]

    async def second_life(services):
        await services[2].insert(numbered(300, 90))  # the split would be another one now
        return [await draw(services, 20, version=7, key=key) for key in keys]

    drawn = run_with_shards(tmp_path, 3, first_life)
    assert all([len(part) for part in parts] == [12, 6, 2] for parts in drawn)
    for parts in drawn:
        assert [{int(id_) // 100 for id_ in part} for part in parts] == [{0}, {1}, {2}]
        assert all(len(set(part)) == len(part) for part in parts)
    assert drawn[0] != drawn[1]
    assert run_with_shards(tmp_path, 3, second_life) == drawn


@pytest.mark.parametrize("takes_first", [False, True])
def test_a_crash_between_two_parts_keeps_those_that_are_logged(tmp_path, takes_first):
    async def first_life(services):
        await services[0].insert(numbered(0, 20))
        await services[1].insert(numbered(100, 20))
        with pytest.raises(ShardLostError):
            await draw([services[0], DyingShard(services[1], takes_first)], 8)
        return await drawn_by_each(services)

    async def second_life(services):
        await services[1].insert(numbered(200, 60))
        before = [await service.offer(SampleRequest(KEY, 8, 5)) for service in services]
        completed = await draw(services, 8, version=5)
        assert [offer.logged for offer in before] == [4, 4 if takes_first else 0]
        assert await draw(services, 8, version=6) == completed
        assert sum(await drawn_by_each(services)) == 8
        return completed

    async def third_life(services):
        return await draw(services, 8, version=9)

    assert run_with_shards(tmp_path, 2, first_life) == [4, 4 if takes_first else 0]
    completed = run_with_shards(tmp_path, 2, second_life)
    assert sum(map(len, completed)) == len(set(completed[0] + completed[1])) == 8
    assert run_with_shards(tmp_path, 2, third_life) == completed


def test_a_shard_that_logged_its_part_gives_the_rest_where_the_other_cannot(tmp_path):
    """Shard 1 offered rows and lost them before it took its part: newer rows came in, which prove a newer version."""

    async def scenario(services):
        await services[0].insert(numbered(0, 20, version=5))
        await services[1].insert(numbered(100, 20, version=3))

        class Late(DyingShard):
            async def sample(self, *arguments):
                await self.service.insert(numbered(200, 1, version=9))
                return await self.service.sample(*arguments)

        parts = await draw([services[0], Late(services[1], takes_first=True)], 8, version=5)
        assert [len(part) for part in parts] in ([7, 1], [8, 0])
        assert len(set(parts[0])) == len(parts[0])
        assert await draw(services, 8, version=5) == parts
        return parts

    async def second_life(services):
        return await draw(services, 8, version=20)

    parts = run_with_shards(tmp_path, 2, scenario, max_staleness=4)
    assert run_with_shards(tmp_path, 2, second_life, max_staleness=4) == parts


def test_what_the_limiter_of_one_shard_keeps_back_the_other_gives(tmp_path):
    async def scenario(services):
        await services[0].insert(numbered(0, 10))
        await services[1].insert(numbered(100, 20))
        await draw(services[:1], 10, key=SampleKey("s", 9, "policy"))  # one sample for each of its inserts
        assert [len(part) for part in await draw(services, 6)] == [0, 6]
        waiting = await started(draw(services, 16, key=SampleKey("s", 1, "policy")))
        assert [(await service.offer(SampleRequest(KEY, 6, 0))).available for service in services] == [0, 14]
        await services[0].insert(numbered(200, 1))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await services[0].insert(numbered(201, 1))
        assert [len(part) for part in await waiting] == [2, 14]

    changes = {"samples_per_insert": 1.0, "samples_per_insert_tolerance": 2.0, "min_size": 2}
    run_with_shards(tmp_path, 2, scenario, **changes)


def test_shards_draw_with_numbers_of_their_own(tmp_path):
    async def scenario(services):
        for service, first in zip(services, (0, 100), strict=True):
            await service.insert(numbered(first, 50))
        return await draw(services, 40)

    first, second = run_with_shards(tmp_path, 2, scenario)
    assert {int(id_) % 100 for id_ in first} != {int(id_) % 100 for id_ in second}


def test_an_empty_shard_holds_nothing_up(tmp_path):
    async def scenario(services):
        await services[1].insert(numbered(0, 20))
        assert [len(part) for part in await draw(services, 8)] == [0, 8, 0]

    run_with_shards(tmp_path, 3, scenario)


def test_a_draw_waits_for_rows_in_any_shard_and_lifts_every_pause(tmp_path):
    async def scenario(services):
        await services[0].insert(numbered(0, 3))
        waiting = await started(draw(services, 8))
        assert not waiting.done()
        assert [(await service.status()).waiting_samples for service in services] == [1, 1]
        await services[1].insert(numbered(10, 4))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await services[0].insert(numbered(20, 1))
        assert [len(part) for part in await waiting] == [4, 4]

    run_with_shards(tmp_path, 2, scenario)


def test_a_draw_of_another_size_than_before_is_refused(tmp_path):
    async def scenario(services):
        for service, first in zip(services, (0, 100), strict=True):
            await service.insert(numbered(first, 20))
        await draw(services, 8)
        with pytest.raises(
            ValueError, match="sampled 8 policy trajectories before the run was interrupted, and asks for 12"
        ):
            await draw(services, 12)
        with pytest.raises(ValueError, match="201 trajectories can never be served: the buffer holds 200"):
            await draw(services, 201, key=SampleKey("s", 1, "policy"))

    run_with_shards(tmp_path, 2, scenario)


def test_rows_of_an_earlier_stage_are_not_drawn_in_any_life(tmp_path):
    """A shard that is restarted does not know of the stage; the draw says it."""

    async def first_life(services):
        await services[0].insert(numbered(0, 20, version=3))
        await services[1].insert(numbered(100, 20, version=4))
        return await draw(services, 8, version=4, first_version=4)

    async def second_life(services):
        await services[0].insert(numbered(200, 20, version=3))
        return await draw(services, 8, version=4, first_version=4, key=SampleKey("s", 1, "policy"))

    for life in (first_life, second_life):
        assert [len(part) for part in run_with_shards(tmp_path, 2, life)] == [0, 8]


def test_a_time_out_says_what_each_shard_lacks(tmp_path):
    async def scenario(services):
        await services[1].insert(numbered(0, 3))
        with pytest.raises(SampleTimeoutError) as caught:
            await draw(services, 8, timeout_s=0.05)
        message = str(caught.value)
        assert message.startswith("waited 0.05 s for 8 policy trajectories from 2 shards: shard 0: 0 are live")
        assert "shard 1: 3 are live" in message

    run_with_shards(tmp_path, 2, scenario)
