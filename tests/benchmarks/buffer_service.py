"""The replay store behind its Ray actor: what is left of its speed when every batch travels between processes."""

from __future__ import annotations

import time
from pathlib import Path

from ray.actor import ActorHandle

from buffer.service.client import BufferClient, Shard
from buffer.service.service import ReplayBufferService
from buffer.service.shard import DrawRequest
from buffer.settings import BufferSettings
from buffer.store.shard import DrawKey
from tests.benchmarks.backend import ray_of_its_own
from tests.benchmarks.buffer_load import ACTIONS, CONTRACT, PROMPT_TOKENS, SENT_ROWS, as_arrow, make_rollouts

WRITERS = (1, 4)
DRAWN_ROWS = 256
DRAWS = 30
TIMEOUT_S = 300.0


def service_rates(folder: Path, num_rows: int) -> dict[str, float]:
    """Rows per second by wall clock, on a Ray of its own on this machine.

    folder: is created for the shards.

    Returns:
        `insert_N_writers`: N processes that pack rollouts and wait for each insert; `sample`: draws, one after the
        other.

    Raises:
        ray.exceptions.GetTimeoutError: a writer or the service did not answer in time.
    """
    import ray

    folder.mkdir()
    rates: dict[str, float] = {}
    with ray_of_its_own(max(WRITERS)):
        for num_writers in WRITERS:
            settings = BufferSettings(capacity=num_rows, min_size=1, fsync="none")
            actor = ray.remote(ReplayBufferService).options(num_cpus=0, max_concurrency=64)
            service = actor.remote(str(folder / f"{num_writers}-writers"), CONTRACT, settings, 0)
            share = num_rows // num_writers
            write = ray.remote(_write)
            spans = ray.get(
                [write.remote(service, writer * share, share) for writer in range(num_writers)], timeout=TIMEOUT_S
            )
            elapsed_s = max(end for _, end in spans) - min(start for start, _ in spans)
            rates[f"insert_{num_writers}_writers"] = round(num_writers * share / elapsed_s)
            client = BufferClient([Shard(0, service)])
            started_s = time.perf_counter()
            for step in range(DRAWS):
                client.draw(DrawRequest(DrawKey("bench", step, "policy"), DRAWN_ROWS, policy_version=0), TIMEOUT_S)
            rates["sample"] = round(DRAWS * DRAWN_ROWS / (time.perf_counter() - started_s))
            ray.get(service.close.remote(), timeout=TIMEOUT_S)
            ray.kill(service)
    return rates


def _write(service: ActorHandle, first: int, num_rows: int) -> tuple[float, float]:
    """Insert rows; gives when that began and ended."""
    import ray

    load = make_rollouts(ACTIONS, PROMPT_TOKENS, seed=0)
    ray.get(service.insert.remote(as_arrow([])), timeout=TIMEOUT_S)  # the service is up
    started_s = time.time()
    for at in range(first, first + num_rows, SENT_ROWS):
        batch = as_arrow(load.rollouts(at, min(SENT_ROWS, first + num_rows - at)))
        reply = ray.get(service.insert.remote(batch), timeout=TIMEOUT_S)
        assert reply.accepted == batch.num_rows, reply
    return started_s, time.time()
