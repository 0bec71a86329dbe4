"""A loop on which hours pass at once, and in order."""

from __future__ import annotations

import asyncio

import pytest

from launch.bench.virtual_time import VirtualTimeLoop


def run(main):
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)


def test_things_happen_in_the_order_of_their_times():
    async def main():
        seen = []

        async def tick(name, interval_s):
            while True:
                await asyncio.sleep(interval_s)
                seen.append((name, asyncio.get_running_loop().time()))

        ticks = [asyncio.create_task(tick("hourly", 3600.0)), asyncio.create_task(tick("odd", 5000.0))]
        await asyncio.sleep(4 * 3600.0)
        for task in ticks:
            task.cancel()
        return seen

    assert run(main()) == [("hourly", 3600), ("odd", 5000), ("hourly", 7200), ("odd", 10000), ("hourly", 10800)]


def test_time_outs_are_of_its_clock():
    async def main():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(100.0):
                await asyncio.sleep(101.0)
        return asyncio.get_running_loop().time()

    assert run(main()) == pytest.approx(100.0)


def test_a_program_in_which_nothing_is_due_is_told_so():
    async def main():
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="nothing is due"):
        run(main())
