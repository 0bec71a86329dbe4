"""The memory of a process whose store grows on disk."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import cast

from buffer.settings import BufferSettings
from buffer.store.shard import DrawKey
from buffer.store.store import ReplayStore
from tests.benchmarks.backend import run_module
from tests.benchmarks.buffer_load import ACTIONS, CONTRACT, PROMPT_TOKENS, SENT_ROWS, as_arrow, make_rollouts

POINTS = 8
DRAWN_ROWS = 256
CAPACITY_BYTES_PER_ROW = 3_000
"""Less than a row takes, so that none is evicted before the store has its size."""
TIMEOUT_S = 3600.0


def memory_while_growing(folder: Path, size_bytes: int) -> list[dict[str, float]]:
    """Fill a store to `size_bytes`, in a process of its own, with draws in between.

    Returns:
        `POINTS` objects: `disk_mib`; `anonymous_mib`: memory that is the process's alone, which has to stay bounded;
        `mapped_mib`: resident pages of files, which the kernel takes back when it needs them.

    Raises:
        TimeoutError, RuntimeError: see `run_module`.
    """
    return cast(list[dict[str, float]], run_module("buffer_growth", folder, size_bytes, timeout_s=TIMEOUT_S))


def _grow(folder: Path, size_bytes: int) -> list[dict[str, float]]:
    load = make_rollouts(ACTIONS, PROMPT_TOKENS, seed=0)
    settings = BufferSettings(capacity=size_bytes // CAPACITY_BYTES_PER_ROW + DRAWN_ROWS, min_size=1, fsync="none")
    store = ReplayStore(folder, CONTRACT, settings, seed=0)
    inserted = 0
    points: list[dict[str, float]] = []
    for point in range(1, POINTS + 1):
        while store.status().size_bytes < size_bytes * point // POINTS:
            store.insert(as_arrow(load.rollouts(inserted, SENT_ROWS)))
            inserted += SENT_ROWS
            if inserted % (64 * SENT_ROWS) == 0:
                assert store.draw(DrawKey("bench", inserted, "policy"), DRAWN_ROWS, 0) is not None
                store.checkpointed("bench", inserted + 1)
        points.append({"disk_mib": round(store.status().size_bytes / 2**20), **_memory_mib()})
    store.close()
    return points


def _memory_mib() -> dict[str, float]:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    kib = {name: value.split()[0] for name, _, value in (line.partition(":") for line in lines) if "Rss" in name}
    return {"anonymous_mib": round(int(kib["RssAnon"]) / 1024, 1), "mapped_mib": round(int(kib["RssFile"]) / 1024, 1)}


if __name__ == "__main__":
    print(json.dumps(_grow(Path(sys.argv[1]), int(sys.argv[2]))))
