"""Replay stores for tests: small ones, draws without ceremony, and folders as a crash leaves them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa

from buffer.settings import BufferSettings
from buffer.store.replay_store import ReplayStore
from tests.trajectories import CONTRACT, fresh_key

SMALL = 8_000
"""segment_bytes that a few inserts fill."""


def open_store(folder: Path, seed: int = 0, **changes: object) -> ReplayStore:
    """A store of 20 rows per source."""
    return ReplayStore(folder, CONTRACT, BufferSettings(**{"capacity": 20, "min_size": 1, **changes}), seed)


def draw(store: ReplayStore, count: int, version: int, source: str = "policy") -> pa.RecordBatch | None:
    """A new draw whose step is covered by a checkpoint at once, so that nothing stays pinned."""
    key = fresh_key(source)
    result = store.draw(key, count, version)
    if result is None:
        return None
    store.checkpointed(key.stage, key.step + 1)
    return result.batch


def live_ids(store: ReplayStore, source: str = "policy") -> set[str]:
    """All live rows, without a draw, which would change them."""
    return set(store._shard.files.ids(store._shard.lanes[source].rows).to_pylist())


def settle(store: ReplayStore) -> None:
    """Wait until every full segment is sealed."""
    upkeep = store._upkeep
    upkeep.tidy()
    while upkeep._sealer.is_busy:
        upkeep.finish_seal()
        upkeep.tidy()


def crash(folder: Path, to: Path) -> Path:
    """The folder as it would be found if the process died now."""

    def copy(source: str, target: str) -> None:
        try:
            shutil.copy2(source, target)
        except FileNotFoundError:
            assert source.endswith(".tmp"), "only a sealed file that is being written is renamed meanwhile"

    return Path(shutil.copytree(folder, to, copy_function=copy))
