"""The replay store behind its Ray actor: what is left of its speed when every batch travels between processes."""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path

from buffer.service.client import BufferClient
from buffer.service.router import DrawRequest
from buffer.service.service import ReplayBufferService
from buffer.service.shard import Shard
from buffer.settings import BufferSettings
from buffer.store.consumption_log import DrawKey
from launch.bench.buffer_load import CONTRACT, SENT_ROWS, as_arrow, make_rollouts

WRITERS = (1, 4)
DRAWN_ROWS = 256
DRAWS = 30
TIMEOUT_S = 300.0


def service_rates(folder: Path, num_rows: int) -> dict[str, float]:
    """Rows per second by wall clock, on a Ray cluster of its own on this machine.

    folder: is created for the shards.

    Returns:
        `insert_N_writers`: N processes that pack rollouts and wait for each insert; `sample`: draws, one after the
        other.

    Raises:
        ray.exceptions.GetTimeoutError: a writer or the service did not answer in time.
    """
    import ray

    folder.mkdir()
    ray.init(
        address="local",  # never somebody else's Ray that happens to run on this machine
        num_cpus=max(WRITERS),
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
    )
    try:
        rates: dict[str, float] = {}
        for num_writers in WRITERS:
            settings = BufferSettings(capacity=num_rows, min_size=1, fsync="none")
            actor = ray.remote(ReplayBufferService).options(num_cpus=0, max_concurrency=64)
            service = actor.remote(str(folder / f"{num_writers}-writers"), CONTRACT, settings, 0)
            share = num_rows // num_writers
            write = ray.remote(_write).options(num_cpus=1)
            spans = ray.get(
                [write.remote(service, writer * share, share) for writer in range(num_writers)], timeout=TIMEOUT_S
            )
            elapsed_s = max(end for _, end in spans) - min(start for start, _ in spans)
            rates[f"insert_{num_writers}_writers"] = round(num_writers * share / elapsed_s)
            client = BufferClient([Shard(0, service)])
            keys = (DrawKey("bench", step, "policy") for step in count())
            started = time.perf_counter()
            for _, key in zip(range(DRAWS), keys, strict=False):
                client.draw(DrawRequest(key, DRAWN_ROWS, policy_version=0), TIMEOUT_S)
            rates["sample"] = round(DRAWS * DRAWN_ROWS / (time.perf_counter() - started))
            ray.get(service.close.remote(), timeout=TIMEOUT_S)
            ray.kill(service)
    finally:
        ray.shutdown()
    return rates


def _write(service: object, first: int, num_rows: int) -> tuple[float, float]:
    """Insert rows; gives when that began and ended."""
    import ray

    load = make_rollouts((50, 500), (16, 64), seed=0)
    insert = service.insert  # type: ignore[attr-defined]
    ray.get(insert.remote(as_arrow([])), timeout=TIMEOUT_S)  # the service is up
    started = time.time()
    for at in range(first, first + num_rows, SENT_ROWS):
        batch = as_arrow(load.rollouts(at, min(SENT_ROWS, first + num_rows - at)))
        reply = ray.get(insert.remote(batch), timeout=TIMEOUT_S)
        assert reply.accepted == batch.num_rows, reply
    return started, time.time()
