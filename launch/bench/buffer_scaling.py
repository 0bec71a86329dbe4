"""What a draw costs as the store grows: whole draws from a store, and the samplers alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa

from buffer.sampling.lane import Lane
from buffer.sampling.row_facts import RowFacts
from buffer.settings import BufferSettings
from buffer.store.consumption_log import DrawKey
from buffer.store.replay_store import ReplayStore
from launch.bench.buffer_load import CONTRACT, as_arrow, make_rollouts

DRAWN_ROWS = 256
DRAWS = 30
INSERT_ROWS = 1024
ACTIONS, PROMPT_TOKENS = (4, 12), (2, 6)
"""Short rollouts: a million of them fit anywhere, and rows, not bytes, are what is counted here."""

SAMPLERS: dict[str, dict[str, object]] = {
    "uniform": {},
    "fifo": {"max_times_sampled": 1_000_000},
    "recency": {},
    "prioritised": {},
    "stratified": {},
}


def sampling_costs(folder: Path, scales: Sequence[int]) -> dict[str, object]:
    """Milliseconds of CPU time of a draw of 256 rows, at each number of live rows.

    Returns:
        `draw_ms`: number of live rows -> a logged draw from a store, rows gathered; `sampler_ms`: sampler -> the same
        for its choice of rows alone; `draw_growth`: largest over smallest of `draw_ms`; `sampler_growth`: likewise.
    """
    draw_ms = _draws(folder, scales)
    sampler_ms = {name: _choices(name, changes, scales) for name, changes in SAMPLERS.items()}
    return {
        "draw_ms": draw_ms,
        "draw_growth": _growth(draw_ms),
        "sampler_ms": sampler_ms,
        "sampler_growth": {name: _growth(each) for name, each in sampler_ms.items()},
    }


def _draws(folder: Path, scales: Sequence[int]) -> dict[str, float]:
    """From one store that grows."""
    load = make_rollouts(ACTIONS, PROMPT_TOKENS, seed=0)
    store = ReplayStore(folder, CONTRACT, BufferSettings(capacity=max(scales), min_size=1, fsync="none"), 0)
    steps = count()

    def draw() -> None:
        step = next(steps)
        assert store.draw(DrawKey("bench", step, "policy"), DRAWN_ROWS, 0) is not None
        store.checkpointed("bench", step + 1)

    costs: dict[str, float] = {}
    inserted = 0
    for scale in sorted(scales):
        while inserted < scale:
            logs = load.rollouts(inserted, min(INSERT_ROWS, scale - inserted))
            store.insert(as_arrow(logs))
            inserted += len(logs)
        costs[str(scale)] = _median_ms(draw)
    store.close()
    return costs


def _choices(name: str, changes: dict[str, object], scales: Sequence[int]) -> dict[str, float]:
    generator = np.random.default_rng(0)
    costs: dict[str, float] = {}
    for scale in sorted(scales):
        lane = Lane(BufferSettings.model_validate({"capacity": scale, "min_size": 1, "sampler": name, **changes}))
        rows = np.arange(scale)
        tasks = np.array([f"task-{index}" for index in range(8)])
        lane.append(
            RowFacts(
                row=rows,
                oldest_version=np.zeros(scale, np.int32),
                created_us=rows,
                task=pa.array(tasks[rows % len(tasks)]),
            )
        )
        lane.update_priorities(rows, generator.random(scale, dtype=np.float32))
        costs[str(scale)] = _median_ms(partial(lane.sample, DRAWN_ROWS, generator))
    return costs


def _median_ms(run: Callable[[], object]) -> float:
    elapsed_s = []
    for _ in range(DRAWS):
        started = time.process_time()
        run()
        elapsed_s.append(time.process_time() - started)
    return round(1e3 * statistics.median(elapsed_s), 4)


def _growth(costs: dict[str, float]) -> float:
    return round(max(costs.values()) / min(costs.values()), 2)
