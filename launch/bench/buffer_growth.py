"""The memory of a process whose store grows on disk."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
from pathlib import Path

POINTS = 8
DRAWN_ROWS = 256
CAPACITY_BYTES_PER_ROW = 3_000
"""Less than a row takes, so that none is evicted before the store has its size."""
TIMEOUT_S = 600.0


def memory_while_growing(folder: Path, size_bytes: int) -> list[dict[str, float]]:
    """Fill a store to `size_bytes`, in a process of its own, with draws in between.

    Returns:
        `POINTS` objects: `disk_mib`; `anonymous_mib`: memory that is the process's alone, which has to stay bounded;
        `mapped_mib`: resident pages of files, which the kernel takes back when it needs them.

    Raises:
        TimeoutError: the process did not reach the next point in time. RuntimeError: it died.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_grow, args=(folder, size_bytes, theirs), daemon=True)
    process.start()
    theirs.close()
    points: list[dict[str, float]] = []
    try:
        while len(points) < POINTS:
            if not ours.poll(TIMEOUT_S):
                raise TimeoutError(f"the growing store did not reach its next point within {TIMEOUT_S:.0f} s")
            points.append(ours.recv())
    except EOFError:
        raise RuntimeError("the process of the growing store died; its error is above") from None
    finally:
        ours.close()
        process.join(timeout=30)
        if process.is_alive():
            process.kill()
            process.join(timeout=10)
    return points


def _grow(folder: Path, size_bytes: int, connection: multiprocessing.connection.Connection) -> None:
    from buffer.settings import BufferSettings
    from buffer.store.consumption_log import DrawKey
    from buffer.store.replay_store import ReplayStore
    from launch.bench.buffer_load import CONTRACT, SENT_ROWS, as_arrow, make_rollouts

    load = make_rollouts((50, 500), (16, 64), seed=0)
    settings = BufferSettings(capacity=size_bytes // CAPACITY_BYTES_PER_ROW + DRAWN_ROWS, min_size=1, fsync="none")
    store = ReplayStore(folder, CONTRACT, settings, seed=0)
    inserted = 0
    for point in range(1, POINTS + 1):
        while store.status().size_bytes < size_bytes * point // POINTS:
            store.insert(as_arrow(load.rollouts(inserted, SENT_ROWS)))
            inserted += SENT_ROWS
            if inserted % (64 * SENT_ROWS) == 0:
                assert store.draw(DrawKey("bench", inserted, "policy"), DRAWN_ROWS, 0) is not None
                store.checkpointed("bench", inserted + 1)
        memory = _memory_mib()
        connection.send({"disk_mib": round(store.status().size_bytes / 2**20), **memory})
    store.close()


def _memory_mib() -> dict[str, float]:
    kib = {
        name: int(value.split()[0])
        for name, _, value in (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
        if name in ("RssAnon", "RssFile")
    }
    return {"anonymous_mib": round(kib["RssAnon"] / 1024, 1), "mapped_mib": round(kib["RssFile"] / 1024, 1)}
