"""The buffer as a Ray actor: batches through the object store, waiting calls, and a kill -9 in mid-insert."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray

from buffer.service.client import BufferClient
from buffer.service.router import DrawRequest
from buffer.service.service import ReplayBufferService
from buffer.service.shard import Shard
from buffer.settings import BufferSettings
from buffer.stop_signals import JOB_SIGNALS
from tests.integration.local_ray import local_ray
from tests.trajectories import CONTRACT, fresh_key, ids_of, numbered

TIMEOUT_S = 60.0


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_ray(num_cpus=2):
        yield


def start(folder, **changes):
    settings = BufferSettings(**{"capacity": 1000, "min_size": 1, **changes})
    actor = ray.remote(ReplayBufferService).options(num_cpus=0, max_concurrency=64)
    return actor.remote(str(folder), CONTRACT, settings, 0)


def draw(service, count, version=0, timeout_s=TIMEOUT_S):
    (drawn,) = BufferClient([Shard(0, service)]).draw(DrawRequest(fresh_key(), count, version), timeout_s)
    return drawn.batch


def end(service):
    ray.get(service.close.remote(), timeout=TIMEOUT_S)
    ray.kill(service)


def test_rows_travel_both_ways_and_draws_wait_in_the_actor(tmp_path):
    service = start(tmp_path)
    batch = numbered(0, 300)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(draw, service, 400)
        reply = ray.get(service.insert.remote(batch), timeout=TIMEOUT_S)
        assert (reply.accepted, reply.rejections, reply.pause) == (300, (), False)
        deadline = time.monotonic() + TIMEOUT_S
        while ray.get(service.status.remote(), timeout=TIMEOUT_S).waiting_draws != 1:
            assert time.monotonic() < deadline, "the draw does not wait"
        # A slice of an object in the store, as an actor that splits its batches sends it.
        ray.get(service.insert.remote(numbered(300, 400).slice(0, 100)), timeout=TIMEOUT_S)
        drawn = waiting.result(timeout=TIMEOUT_S)
    assert sorted(map(int, ids_of(drawn))) == list(range(400))
    assert drawn.schema.equals(batch.schema, check_metadata=True)
    rows = {row["id"]: row for row in batch.to_pylist()}
    assert all(rows[row["id"]] == row for row in drawn.to_pylist() if row["id"] in rows)
    end(service)


def test_signals_of_a_job_system_do_not_end_the_actor(tmp_path):
    """They reach all processes of a job at once; the driver alone stops the run."""
    service = start(tmp_path)
    pid, status = ray.get(
        service.__ray_call__.remote(lambda _: (os.getpid(), Path("/proc/self/status").read_text())), timeout=TIMEOUT_S
    )
    (ignored,) = (int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigIgn"))
    assert {number for number in JOB_SIGNALS if ignored >> (number - 1) & 1} == {*JOB_SIGNALS}
    for number in JOB_SIGNALS:
        os.kill(pid, number)
    assert ray.get(service.insert.remote(numbered(0, 10)), timeout=TIMEOUT_S).accepted == 10
    end(service)


def test_errors_arrive_as_what_they_are(tmp_path):
    service = start(tmp_path)
    with pytest.raises(TimeoutError, match="no actor has inserted anything since the buffer started"):
        draw(service, 1, timeout_s=0.1)
    with pytest.raises(ValueError, match="schema version none"):
        ray.get(service.insert.remote(numbered(0, 1).replace_schema_metadata(None)), timeout=TIMEOUT_S)
    end(service)


def test_many_paused_actors_leave_room_for_the_learner(tmp_path):
    service = start(tmp_path, samples_per_insert_tolerance=4)
    assert ray.get(service.insert.remote(numbered(0, 10)), timeout=TIMEOUT_S).pause
    paused = [service.wait_for_demand.remote(timeout_s=TIMEOUT_S) for _ in range(16)]
    assert ray.wait(paused, timeout=0.2)[0] == []
    assert draw(service, 10).num_rows == 10
    assert ray.get(paused, timeout=TIMEOUT_S) == [True] * 16
    end(service)


def test_a_new_actor_goes_on_where_a_killed_one_stopped(tmp_path):
    service = start(tmp_path)
    pid = ray.get(service.__ray_call__.remote(lambda _: os.getpid()), timeout=TIMEOUT_S)
    ray.get(service.insert.remote(numbered(0, 20, version=3)), timeout=TIMEOUT_S)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(service.status.remote(), timeout=TIMEOUT_S)
    service = start(tmp_path)
    assert ray.get(service.newest_version.remote(), timeout=TIMEOUT_S) == 3
    assert draw(service, 20, version=3).num_rows == 20
    end(service)
