"""The replay store against TorchRL's and cpprb's buffers: rows per second in and out, and bytes on disk.

All run in this process, one after the other, on the same rollouts of different lengths. An insert begins with finished
rollouts, one array per column and rollout, and ends when the store has them; packing is part of it, since it is where
stores of fixed-size rows pay for padding. The time without packing is reported beside it.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from launch.bench.buffer_growth import memory_while_growing
from launch.bench.buffer_load import RolloutLoad, make_rollouts
from launch.bench.buffer_scaling import sampling_costs
from launch.bench.buffer_sides import Side, SideName, disk_bytes, drop_page_cache, major_faults, open_side
from launch.bench.hardware import hardware

NAMES: tuple[SideName, ...] = ("ours", "ours_fsync_batch", "torchrl", "cpprb")
ACTIONS, PROMPT_TOKENS = (50, 500), (16, 64)
INSERT_ROWS = (8, 32, 64)
DRAWN_ROWS = (64, 128, 256)
WRITERS = 4
WRITER_ROWS = 32
DRAWS = 60
COLD_DRAWS = 3


@dataclass
class _Found:
    """Of one side in one repetition. Rates are of rows; by_size: rows per insert or draw -> rows per second."""

    insert: float = 0.0
    insert_packed: float = 0.0
    insert_writers: float = 0.0
    sample_warm: float = 0.0
    sample_cold: float = 0.0
    cold_major_faults: int = 0
    row_bytes_in_draws: float = 0.0
    disk_row_bytes: float = 0.0
    insert_by_size: dict[int, float] = field(default_factory=dict)
    sample_by_size: dict[int, float] = field(default_factory=dict)


def bench_buffer(
    *,
    num_rows: int = 20_000,
    repetitions: int = 5,
    scales: Sequence[int] = (10_000, 100_000, 1_000_000),
    grow_bytes: int = 2**29,
    folder: Path | None = None,
    seed: int = 0,
) -> dict[str, object]:
    """Measure all; minutes.

    Args:
        num_rows: rollouts that each store takes per repetition, of 50 to 500 actions.
        scales: live rows at which the cost of a draw is measured.
        grow_bytes: size to which a store grows while its memory is watched; 0 = leave that out.
        folder: where the stores put their files; a temporary folder by default.

    Returns:
        JSON object. `insert_ratio_to_torchrl`, `sample_ratio_to_torchrl`, `disk_ratio_to_torchrl` and the same to
        cpprb: ours over theirs, medians over repetitions, with our `fsync=none` (theirs have no other); `spread`:
        smallest and largest ratio of a repetition; `rows_per_s` and `bytes_per_s` (of what a rollout holds without
        padding) per store.

    Raises:
        ImportError: TorchRL or cpprb is not installed. ValueError: `num_rows` is too small for the draws.
    """
    for module in ("torchrl", "cpprb"):
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"{module} is not installed; it comes with the extra `bench`")
    if num_rows < max(DRAWN_ROWS):
        raise ValueError(f"{num_rows} rows are too few to draw {max(DRAWN_ROWS)} of them: choose more")
    load = make_rollouts(ACTIONS, PROMPT_TOKENS, seed)
    found: dict[SideName, list[_Found]] = {name: [] for name in NAMES}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        root = Path(scratch)
        for repetition in range(repetitions):
            # Who goes first alternates, so that a drift of the machine favours nobody.
            for name in NAMES if repetition % 2 == 0 else reversed(NAMES):
                found[name].append(_measure(name, root / f"{name}-{repetition}", num_rows, load))
        scaling = sampling_costs(root / "scaling", scales)
        growth = memory_while_growing(root / "growth", grow_bytes) if grow_bytes else []
    return {
        **_ratios(found),
        "rows_per_s": {name: _rates(each) for name, each in found.items()},
        "bytes_per_s": {name: _byte_rates(each, _row_bytes(load)) for name, each in found.items()},
        "rows_per_s_by_size": {
            name: {
                "insert": _by_size([one.insert_by_size for one in each]),
                "sample": _by_size([one.sample_by_size for one in each]),
            }
            for name, each in found.items()
        },
        "disk_bytes_per_row": {
            name: round(_median(each, lambda one: one.disk_row_bytes), 1) for name, each in found.items()
        },
        "cold_major_faults": {name: _median(each, lambda one: one.cold_major_faults) for name, each in found.items()},
        "sampling": scaling,
        "memory_while_growing": growth,
        "num_rows": num_rows,
        "actions_per_rollout": list(ACTIONS),
        "insert_rows": list(INSERT_ROWS),
        "drawn_rows": list(DRAWN_ROWS),
        "page_cache": "inserts: new files, written back by the kernel; warm: as the inserts left it; cold: dropped",
        "repetitions": repetitions,
        "seeds": [seed],
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {name: version(name) for name in ("pyarrow", "torch", "torchrl", "cpprb")},
        "hardware": hardware(),
        "command": " ".join(sys.argv),
    }


def _measure(name: SideName, folder: Path, num_rows: int, load: RolloutLoad) -> _Found:
    found = _Found()
    side = open_side(name, folder, num_rows, load)
    pack_s = insert_s = 0.0
    first, inserted = 0, 0
    for index, size in enumerate(INSERT_ROWS):
        end = num_rows * (index + 1) // len(INSERT_ROWS)
        elapsed_s, begin = 0.0, first
        while first < end:
            logs = load.rollouts(first, min(size, end - first))
            started = time.perf_counter()
            packed = side.pack(logs)
            packed_at = time.perf_counter()
            side.insert(packed)
            done = time.perf_counter()
            pack_s += packed_at - started
            insert_s += done - packed_at
            elapsed_s += done - started
            first += len(logs)
        found.insert_by_size[size] = (end - begin) / elapsed_s
        inserted += end - begin
    found.insert, found.insert_packed = inserted / (pack_s + insert_s), inserted / insert_s
    drawn_rows = drawn_s = drawn_bytes = 0.0
    for count in DRAWN_ROWS:
        side.sample(count)
        started = time.perf_counter()
        for _ in range(DRAWS):
            drawn_bytes += side.sample(count)
        elapsed_s = time.perf_counter() - started
        found.sample_by_size[count] = DRAWS * count / elapsed_s
        drawn_rows += DRAWS * count
        drawn_s += elapsed_s
    found.sample_warm, found.row_bytes_in_draws = drawn_rows / drawn_s, drawn_bytes / drawn_rows
    found.sample_cold, found.cold_major_faults = _sample_cold(side)
    side.close()
    found.disk_row_bytes = disk_bytes(folder) / num_rows
    found.insert_writers = _insert_with_writers(name, folder.with_name(folder.name + "-writers"), num_rows, load)
    return found


def _sample_cold(side: Side) -> tuple[float, int]:
    """Rows per second of draws whose rows are not in memory, and major faults."""
    drawn_s, faults, count = 0.0, 0, DRAWN_ROWS[-1]
    for _ in range(COLD_DRAWS):
        drop_page_cache(side.folder)
        before = major_faults()
        started = time.perf_counter()
        side.sample(count)
        drawn_s += time.perf_counter() - started
        faults += major_faults() - before
    return COLD_DRAWS * count / drawn_s, faults


def _insert_with_writers(name: SideName, folder: Path, num_rows: int, load: RolloutLoad) -> float:
    """Rows per second of several threads that pack and insert."""
    side = open_side(name, folder, num_rows, load)
    share = num_rows // WRITERS

    def write(writer: int) -> None:
        for first in range(writer * share, (writer + 1) * share, WRITER_ROWS):
            side.insert(side.pack(load.rollouts(first, min(WRITER_ROWS, (writer + 1) * share - first))))

    started = time.perf_counter()
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write, range(WRITERS)))
    elapsed_s = time.perf_counter() - started
    side.close()
    return WRITERS * share / elapsed_s


_RATIOS: dict[str, Callable[[_Found], float]] = {
    "insert_ratio": lambda found: found.insert,
    "insert_packed_ratio": lambda found: found.insert_packed,
    "insert_4_writers_ratio": lambda found: found.insert_writers,
    "sample_ratio": lambda found: found.sample_warm,
    "sample_cold_ratio": lambda found: found.sample_cold,
    "disk_ratio": lambda found: found.disk_row_bytes,
}


def _ratios(found: dict[SideName, list[_Found]]) -> dict[str, object]:
    medians: dict[str, object] = {}
    spread: dict[str, list[float]] = {}
    sides: tuple[tuple[SideName, str], ...] = (("ours", ""), ("ours_fsync_batch", "_fsync_batch"))
    rivals: tuple[SideName, ...] = ("torchrl", "cpprb")
    for ours, suffix in sides:
        for rival in rivals:
            for name, of in _RATIOS.items():
                if suffix and not name.startswith("insert"):
                    continue
                ratios = [of(mine) / of(theirs) for mine, theirs in zip(found[ours], found[rival], strict=True)]
                key = f"{name}_to_{rival}{suffix}"
                medians[key] = round(statistics.median(ratios), 3)
                spread[key] = [round(min(ratios), 3), round(max(ratios), 3)]
    return {**medians, "spread": spread}


def _rates(found: list[_Found]) -> dict[str, float]:
    return {
        "insert": round(_median(found, lambda one: one.insert)),
        "insert_packed": round(_median(found, lambda one: one.insert_packed)),
        "insert_4_writers": round(_median(found, lambda one: one.insert_writers)),
        "sample_warm": round(_median(found, lambda one: one.sample_warm)),
        "sample_cold": round(_median(found, lambda one: one.sample_cold)),
    }


def _byte_rates(found: list[_Found], row_bytes: float) -> dict[str, float]:
    return {name: round(rate * row_bytes) for name, rate in _rates(found).items()}


def _row_bytes(load: RolloutLoad) -> float:
    """Mean bytes of a rollout's numbers, unpadded: 4 each for prompt ids, actions, log-probabilities, versions."""
    return statistics.mean(4 * len(log.prompt_ids) + 12 * len(log.actions) for log in load.logs)


def _by_size(found: list[dict[int, float]]) -> dict[str, float]:
    return {str(size): round(statistics.median(one[size] for one in found)) for size in found[0]}


def _median(found: list[_Found], of: Callable[[_Found], float]) -> float:
    return statistics.median(of(one) for one in found)
