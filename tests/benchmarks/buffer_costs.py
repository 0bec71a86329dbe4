"""What our store costs beside its speed: draws and opening by live rows, memory by size, and the way through Ray."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, cast

import numpy as np
import psutil

from buffer.settings import BufferSettings
from buffer.store.shard import SampleKey
from buffer.store.store import ReplayStore
from tests.benchmarks.backend import run_module
from tests.benchmarks.buffer_load import CONTRACT, SENT_ROWS, as_arrow, make_rollouts, take

if TYPE_CHECKING:
    from ray.actor import ActorHandle

DRAWN_ROWS, DRAWS = 256, 30
SAMPLERS = ("uniform", "fifo", "recency", "prioritized", "stratified")
SHORT = {"actions": (4, 12), "prompt": (2, 6)}
"""A million of such rollouts fit anywhere, and rows, not bytes, are what `costs_by_size` counts."""
BULK_ROWS = 1024
POINTS = 8
CAPACITY_BYTES_PER_ROW = 3_000
"""Less than a row takes, so that none is evicted before the store has its size."""
WRITERS = (1, 4)
GROWTH_TIMEOUT_S, ANSWER_TIMEOUT_S = 3600.0, 300.0


def costs_by_size(folder: Path, scales: Sequence[int]) -> dict[str, object]:
    """CPU time by the number of live rows, of one store that grows.

    Returns:
        `sampler_ms`: sampler -> live rows -> milliseconds of a draw of 256 rows: choice, record and gather.
        `sample_ms`:
        those of the default sampler. `draw_growth`, `sampler_growth`: largest over smallest. `opening_cpu_s`: live
        rows -> seconds to open the store, as after a restart of its process.
    """
    rollouts = make_rollouts(0, **SHORT)
    steps = count()
    opening_s: dict[str, float] = {}
    sampler_ms: dict[str, dict[str, float]] = {name: {} for name in SAMPLERS}
    for scale in sorted(scales):
        store = _open(folder, max(scales))
        for first in range(store.num_live("policy"), scale, BULK_ROWS):
            store.insert(as_arrow(take(rollouts, first, min(BULK_ROWS, scale - first))))
        store.close()
        for sampler in SAMPLERS:
            started_s = time.process_time()
            store = _open(folder, max(scales), sampler)
            opening_s.setdefault(str(scale), round(time.process_time() - started_s, 3))
            if sampler == "prioritized":
                store.update_priorities(np.arange(scale), np.random.default_rng(0).random(scale, dtype=np.float32))
            drawn_s = []
            for _ in range(DRAWS):
                started_s = time.process_time()
                _sample(store, next(steps))
                drawn_s.append(time.process_time() - started_s)
            sampler_ms[sampler][str(scale)] = round(1e3 * median(drawn_s), 4)
            store.close()
    growth = {name: round(max(each.values()) / min(each.values()), 2) for name, each in sampler_ms.items()}
    return {
        "sample_ms": sampler_ms[SAMPLERS[0]],
        "draw_growth": growth[SAMPLERS[0]],
        "sampler_ms": sampler_ms,
        "sampler_growth": growth,
        "opening_cpu_s": opening_s,
    }


def memory_while_growing(folder: Path, size_bytes: int) -> list[dict[str, float]]:
    """Fill a store to `size_bytes`, in a process of its own, with draws in between.

    Returns:
        `POINTS` objects: `disk_mib`; `anonymous_mib`: memory that is the process's alone, which has to stay bounded;
        `mapped_mib`: resident pages of files, which the kernel takes back when it needs them.
    """
    return cast(list[dict[str, float]], run_module("buffer_costs", folder, size_bytes, timeout_s=GROWTH_TIMEOUT_S))


def _grow(folder: Path, size_bytes: int) -> list[dict[str, float]]:
    rollouts = make_rollouts(0)
    store = _open(folder, size_bytes // CAPACITY_BYTES_PER_ROW + DRAWN_ROWS)
    inserted = 0
    points: list[dict[str, float]] = []
    for point in range(1, POINTS + 1):
        while store.status().size_bytes < size_bytes * point // POINTS:
            store.insert(as_arrow(take(rollouts, inserted, SENT_ROWS)))
            inserted += SENT_ROWS
            if inserted % (64 * SENT_ROWS) == 0:
                _sample(store, inserted)
        memory = psutil.Process().memory_info()
        sizes = {
            "disk_mib": store.status().size_bytes,
            "anonymous_mib": memory.rss - memory.shared,
            "mapped_mib": memory.shared,
        }
        points.append({name: round(size / 2**20, 1) for name, size in sizes.items()})
    store.close()
    return points


def service_rates(folder: Path, num_rows: int) -> dict[str, float]:
    """Rows per second by wall clock, on a Ray of its own on this machine.

    folder: is created for the shards.

    Returns:
        `insert_N_writers`: N processes that pack rollouts and wait for each insert; `sample`: draws, one after the
        other.
    """
    import ray

    from buffer.service.client import BufferClient, Shard
    from buffer.service.service import ReplayBufferService
    from buffer.service.shard import SampleRequest
    from tests.integration.local_ray import local_ray

    folder.mkdir()
    rates: dict[str, float] = {}
    with local_ray(max(WRITERS)):
        for num_writers in WRITERS:
            settings = BufferSettings(capacity=num_rows, min_size=1, fsync="none")
            actor = ray.remote(ReplayBufferService).options(num_cpus=0, max_concurrency=64)
            service = actor.remote(str(folder / f"{num_writers}-writers"), CONTRACT, settings, 0)
            share = num_rows // num_writers
            write = ray.remote(_write)
            writing = [write.remote(service, writer * share, share) for writer in range(num_writers)]
            spans = ray.get(writing, timeout=ANSWER_TIMEOUT_S)
            elapsed_s = max(end for _, end in spans) - min(start for start, _ in spans)
            rates[f"insert_{num_writers}_writers"] = round(num_writers * share / elapsed_s)
            client = BufferClient([Shard(0, service)])
            started_s = time.perf_counter()
            for step in range(DRAWS):
                key = SampleKey("bench", step, "policy")
                client.sample(SampleRequest(key, DRAWN_ROWS, policy_version=0), ANSWER_TIMEOUT_S)
            rates["sample"] = round(DRAWS * DRAWN_ROWS / (time.perf_counter() - started_s))
            ray.get(service.close.remote(), timeout=ANSWER_TIMEOUT_S)
            ray.kill(service)
    return rates


def _write(service: ActorHandle, first: int, num_rows: int) -> tuple[float, float]:
    """Insert rows; gives when that began and ended."""
    import ray

    rollouts = make_rollouts(0)
    ray.get(service.insert.remote(as_arrow([])), timeout=ANSWER_TIMEOUT_S)  # the service is up
    started_s = time.time()
    for at in range(first, first + num_rows, SENT_ROWS):
        batch = as_arrow(take(rollouts, at, min(SENT_ROWS, first + num_rows - at)))
        reply = ray.get(service.insert.remote(batch), timeout=ANSWER_TIMEOUT_S)
        assert reply.accepted == batch.num_rows, reply
    return started_s, time.time()


def _open(folder: Path, capacity: int, sampler: str = "uniform") -> ReplayStore:
    most = {"max_times_sampled": 1_000_000} if sampler == "fifo" else {}
    settings = {"capacity": capacity, "min_size": 1, "fsync": "none", "sampler": sampler, **most}
    return ReplayStore(folder, CONTRACT, BufferSettings.model_validate(settings), seed=0)


def _sample(store: ReplayStore, step: int) -> None:
    assert store.sample(SampleKey("bench", step, "policy"), DRAWN_ROWS, 0) is not None
    store.checkpointed("bench", step + 1)


if __name__ == "__main__":
    print(json.dumps(_grow(Path(sys.argv[1]), int(sys.argv[2]))))
