"""Maintenance beside the work of a shard: syncs on the timer, files rewritten in a thread, failures that are told."""

from __future__ import annotations

import asyncio
import os
import threading
from datetime import UTC, datetime

import pytest

from buffer.service.service import ReplayBufferService, ShardMaintenance
from buffer.service.shard import SampleRequest
from buffer.settings import BufferSettings
from buffer.store.maintenance import RewritePlan
from buffer.store.store import ReplayStore
from tests.trajectories import CONTRACT, fresh_key, ids_of, numbered

QUICK_S = 0.01


def run_with_maintenance(folder, scenario, **changes):
    """Run `scenario(store, maintenance)` on an event loop."""

    async def run():
        settings = BufferSettings(**{"min_size": 1, **changes})
        store = ReplayStore(folder, CONTRACT, settings, seed=0)
        maintenance = ShardMaintenance(store, settings, interval_s=QUICK_S)
        try:
            async with asyncio.timeout(30):
                return await scenario(store, maintenance)
        finally:
            await maintenance.stop()
            store.close()

    return asyncio.run(run())


async def until(condition):
    while not condition():
        await asyncio.sleep(QUICK_S)


def fill(store):
    """Sealed segments of which every other row became stale."""
    for first in range(0, 160, 2):
        store.insert(numbered(first, 1, version=0))
        store.insert(numbered(first + 1, 1, version=9))
    assert store.sample(fresh_key(), 1, 9) is not None
    assert store.num_live("policy") == 80


SPARSE = {"segment_bytes": 8_000, "max_staleness": 2, "compaction_threshold": 0.9}


def test_segments_are_rewritten_while_inserts_and_draws_go_on(tmp_path, monkeypatch):
    running, go_on = threading.Event(), threading.Event()
    run = RewritePlan.run

    def slow_run(plan):
        running.set()
        assert go_on.wait(timeout=20), "the event loop stood still"
        return run(plan)

    monkeypatch.setattr(RewritePlan, "run", slow_run)

    async def scenario(store, maintenance):
        fill(store)
        key = fresh_key()
        before = store.sample(key, 15, 9)
        maintenance.ensure()
        await until(running.is_set)
        size_bytes = store.status().size_bytes
        store.insert(numbered(300, 10, version=9))
        assert store.sample(fresh_key(), 20, 9) is not None
        go_on.set()
        await until(lambda: store.status().size_bytes < 0.7 * size_bytes)
        assert ids_of(store.sample(key, 15, 9).batch) == ids_of(before.batch)

    run_with_maintenance(tmp_path, scenario, **SPARSE)
    store = ReplayStore(tmp_path, CONTRACT, BufferSettings(min_size=1, **SPARSE), seed=0)
    assert store.num_live("policy") == 90
    store.close()


def test_rows_grow_too_old_without_anybody_calling(tmp_path):
    async def scenario(store, maintenance):
        store.insert(numbered(0, 10, created_at=datetime.now(UTC)))
        assert store.num_live("policy") == 10
        maintenance.ensure()
        await until(lambda: store.num_live("policy") == 0)

    run_with_maintenance(tmp_path, scenario, max_age_s=0.3)


def test_a_stop_waits_for_the_rewriting_under_way(tmp_path, monkeypatch):
    """Another process may open the folder as soon as the lock is gone."""
    running, done = threading.Event(), threading.Event()
    run = RewritePlan.run

    def slow_run(plan):
        running.set()
        threading.Event().wait(0.3)
        rewrite = run(plan)
        done.set()
        return rewrite

    monkeypatch.setattr(RewritePlan, "run", slow_run)

    async def scenario(store, maintenance):
        fill(store)
        maintenance.ensure()
        await until(running.is_set)
        await maintenance.stop()
        assert done.is_set()

    run_with_maintenance(tmp_path, scenario, **SPARSE)


def test_a_rewriting_that_fails_is_told_and_nothing_is_lost(tmp_path, monkeypatch):
    def fail(plan):
        raise OSError("no space left")

    monkeypatch.setattr(RewritePlan, "run", fail)

    async def scenario(store, maintenance):
        fill(store)
        maintenance.ensure()
        await until(lambda: store.status().maintenance_error is not None)
        assert "no space left" in store.status().maintenance_error
        maintenance.ensure()  # not for the callers to fail
        assert store.sample(fresh_key(), 20, 9) is not None

    run_with_maintenance(tmp_path, scenario, **SPARSE)


def test_the_timer_syncs_what_inserts_did_not(tmp_path, monkeypatch):
    synced = []
    for name in ("fsync", "fdatasync"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda file, real=real: (synced.append(threading.current_thread()), real(file)))

    async def scenario(store, maintenance):
        synced.clear()
        store.insert(numbered(0, 10))
        assert synced == []
        maintenance.ensure()
        await until(lambda: len(synced) >= 4)  # segment and log, more than once
        assert threading.main_thread() not in synced

    run_with_maintenance(tmp_path, scenario, fsync="interval", fsync_interval_s=QUICK_S)


def test_a_sync_that_fails_is_told_to_every_caller(tmp_path, monkeypatch):
    """What was acknowledged may not be on disk: the shard must not go on as if it were."""

    async def run():
        settings = BufferSettings(min_size=1, fsync="interval", fsync_interval_s=QUICK_S)
        service = ReplayBufferService(str(tmp_path), CONTRACT, settings, 0)

        def fail():
            raise OSError("the disk is gone")

        await service.insert(numbered(0, 10))
        monkeypatch.setattr(service._store, "prepare_sync", lambda: fail)
        await until(lambda: any(task.done() for task in service._maintenance._tasks))
        for call in (
            service.insert(numbered(10, 10)),
            service.offer(SampleRequest(fresh_key(), 5, 0)),
            service.status(),
        ):
            with pytest.raises(OSError, match="the disk is gone"):
                await call
        await service.close()

    asyncio.run(run())
