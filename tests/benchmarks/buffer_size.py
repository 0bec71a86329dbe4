"""What a draw and the opening of a store cost as the number of live rows grows."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from statistics import median

import numpy as np

from buffer.settings import BufferSettings
from buffer.store.shard import DrawKey
from buffer.store.store import ReplayStore
from tests.benchmarks.buffer_load import CONTRACT, as_arrow, make_rollouts

DRAWN_ROWS = 256
DRAWS = 30
INSERT_ROWS = 1024
ACTIONS, PROMPT_TOKENS = (4, 12), (2, 6)
"""Short rollouts: a million of them fit anywhere, and rows, not bytes, are what is counted here."""

SAMPLERS = ("uniform", "fifo", "recency", "prioritised", "stratified")


def costs_by_size(folder: Path, scales: Sequence[int]) -> dict[str, object]:
    """CPU time by the number of live rows, of one store that grows.

    Returns:
        `sampler_ms`: sampler -> live rows -> milliseconds of a draw of 256 rows: choice, record and gather. `draw_ms`:
        those of the default sampler. `draw_growth`, `sampler_growth`: largest over smallest. `opening_cpu_s`: live
        rows -> seconds to open the store, as after a restart of its process.
    """
    load = make_rollouts(ACTIONS, PROMPT_TOKENS, seed=0)
    steps = count()
    opening_s: dict[str, float] = {}
    sampler_ms: dict[str, dict[str, float]] = {name: {} for name in SAMPLERS}
    for scale in sorted(scales):
        store = _open(folder, SAMPLERS[0], max(scales))
        for first in range(store.num_live("policy"), scale, INSERT_ROWS):
            store.insert(as_arrow(load.rollouts(first, min(INSERT_ROWS, scale - first))))
        store.close()
        for sampler in SAMPLERS:
            started_s = time.process_time()
            store = _open(folder, sampler, max(scales))
            opening_s.setdefault(str(scale), round(time.process_time() - started_s, 3))
            if sampler == "prioritised":
                priorities = np.random.default_rng(0).random(scale, dtype=np.float32)
                store.update_priorities(np.arange(scale), priorities)
            sampler_ms[sampler][str(scale)] = _draw_ms(store, steps)
            store.close()
    draw_ms = sampler_ms[SAMPLERS[0]]
    return {
        "draw_ms": draw_ms,
        "draw_growth": _growth(draw_ms),
        "sampler_ms": sampler_ms,
        "sampler_growth": {name: _growth(each) for name, each in sampler_ms.items()},
        "opening_cpu_s": opening_s,
    }


def _open(folder: Path, sampler: str, capacity: int) -> ReplayStore:
    most = {"max_times_sampled": 1_000_000} if sampler == "fifo" else {}
    settings = {"capacity": capacity, "min_size": 1, "fsync": "none", "sampler": sampler, **most}
    return ReplayStore(folder, CONTRACT, BufferSettings.model_validate(settings), seed=0)


def _draw_ms(store: ReplayStore, steps: Iterator[int]) -> float:
    elapsed_s = []
    for step in islice(steps, DRAWS):
        started_s = time.process_time()
        assert store.draw(DrawKey("bench", step, "policy"), DRAWN_ROWS, 0) is not None
        store.checkpointed("bench", step + 1)
        elapsed_s.append(time.process_time() - started_s)
    return round(1e3 * median(elapsed_s), 4)


def _growth(costs: dict[str, float]) -> float:
    return round(max(costs.values()) / min(costs.values()), 2)
