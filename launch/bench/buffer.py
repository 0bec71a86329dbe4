"""The replay store against TorchRL's and cpprb's buffers: rows per second in and out, and bytes on disk.

All run in this process, one after the other, on the same rollouts of different lengths. An insert begins with finished
rollouts, one array per column and rollout, and ends when the store has them; packing is part of it, since it is where
stores of fixed-size rows pay for padding. TorchRL's users pad with `tensordict.pad_sequence`; `torchrl_hand_padded` is
the same buffer with the quickest padding that numpy has. Inserts without packing are reported as `insert_packed`.
Ratios of inserts are those of as many rows at a time as an actor sends; `rows_per_cpu_s_by_size` has the other sizes.
Draws are so many that what the inserts left to do in the background, beside the first of them, counts for little. Bytes
on disk are those before the first draw; what our log of the draws takes is `disk_bytes_per_drawn_row`.
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
from typing import Literal

from launch.bench.buffer_growth import memory_while_growing
from launch.bench.buffer_load import SENT_ROWS, RolloutLoad, make_rollouts
from launch.bench.buffer_scaling import sampling_costs
from launch.bench.buffer_service import service_rates
from launch.bench.buffer_sides import Side, SideName, disk_bytes, drop_page_cache, major_faults, open_side
from launch.bench.hardware import hardware

NAMES: tuple[SideName, ...] = ("ours", "ours_fsync_batch", "torchrl", "torchrl_hand_padded", "cpprb")
ACTIONS, PROMPT_TOKENS = (50, 500), (16, 64)
INSERT_ROWS = (8, 64, 256)
DRAWN_ROWS = (64, 128, 256)
WRITERS = 4
DRAWS = 600
COLD_DRAWS = 3

Clock = Literal["wall_s", "cpu_s"]
Measure = Literal["insert", "insert_packed", "insert_4_writers", "sample_warm", "sample_cold"]
MEASURES: tuple[Measure, ...] = ("insert", "insert_packed", "insert_4_writers", "sample_warm", "sample_cold")


@dataclass
class _Stopwatch:
    """Adds up what is done between `start` and `stop`. cpu_s: of this process; a busy machine disturbs it less."""

    rows: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0

    def start(self) -> None:
        self.wall_s -= time.perf_counter()
        self.cpu_s -= time.process_time()

    def stop(self, rows: int) -> None:
        self.wall_s += time.perf_counter()
        self.cpu_s += time.process_time()
        self.rows += rows

    def rate(self, clock: Clock, also: _Stopwatch | None = None) -> float:
        """Rows per second, where `also` belongs to the same rows."""
        elapsed_s: float = getattr(self, clock) + (getattr(also, clock) if also else 0.0)
        return self.rows / elapsed_s


@dataclass
class _Found:
    """Of one side in one repetition, by rows per insert or draw."""

    pack: dict[int, _Stopwatch] = field(default_factory=dict)
    insert: dict[int, _Stopwatch] = field(default_factory=dict)
    sample: dict[int, _Stopwatch] = field(default_factory=dict)
    writers: _Stopwatch = field(default_factory=_Stopwatch)
    cold: _Stopwatch = field(default_factory=_Stopwatch)
    cold_major_faults: int = 0
    disk_row_bytes: float = 0.0
    disk_drawn_row_bytes: float = 0.0

    def rate(self, measure: Measure, clock: Clock) -> float:
        """Rows per second: of inserts of `SENT_ROWS`, of draws over all sizes."""
        match measure:
            case "insert":
                return self.insert[SENT_ROWS].rate(clock, self.pack[SENT_ROWS])
            case "insert_packed":
                return self.insert[SENT_ROWS].rate(clock)
            case "insert_4_writers":
                return self.writers.rate(clock)
            case "sample_warm":
                return _total(self.sample).rate(clock)
            case "sample_cold":
                return self.cold.rate(clock)


def _total(watches: dict[int, _Stopwatch]) -> _Stopwatch:
    each = watches.values()
    return _Stopwatch(sum(one.rows for one in each), sum(one.wall_s for one in each), sum(one.cpu_s for one in each))


def bench_buffer(
    *,
    num_rows: int = 20_000,
    repetitions: int = 5,
    scales: Sequence[int] = (10_000, 100_000, 1_000_000),
    grow_bytes: int = 2**29,
    with_service: bool = False,
    folder: Path | None = None,
    seed: int = 0,
) -> dict[str, object]:
    """Measure all; minutes.

    Args:
        num_rows: rollouts that each store takes per repetition, of 50 to 500 actions.
        scales: live rows at which the cost of a draw is measured.
        grow_bytes: size to which a store grows while its memory is watched; 0 = leave that out.
        with_service: measure our store behind its Ray actor too.
        folder: where the stores put their files; a temporary folder by default.

    Returns:
        JSON object. `insert_ratio_to_torchrl`, `sample_ratio_to_torchrl`, `disk_ratio_to_torchrl` and the same for the
        others: ours over theirs, medians over repetitions, with our `fsync=none` (they have no other); `spread`:
        smallest and largest ratio of a repetition; `by_cpu_time`: the same in time of this process; `rows_per_s` and
        `bytes_per_s` (of what a rollout holds without padding) of each.

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
        service = service_rates(root / "service", num_rows) if with_service else None
    return {
        **_ratios(found, "wall_s"),
        "by_cpu_time": _ratios(found, "cpu_s"),
        "rows_per_s": _rates(found, "wall_s"),
        "rows_per_cpu_s": _rates(found, "cpu_s"),
        "bytes_per_s": _rates(found, "wall_s", _row_bytes(load)),
        "rows_per_cpu_s_by_size": _rates_by_size(found, "cpu_s"),
        "disk_bytes_per_row": {
            name: round(_median(each, lambda one: one.disk_row_bytes)) for name, each in found.items()
        },
        "disk_bytes_per_drawn_row": {
            name: round(_median(each, lambda one: one.disk_drawn_row_bytes), 2) for name, each in found.items()
        },
        "cold_major_faults": {name: _median(each, lambda one: one.cold_major_faults) for name, each in found.items()},
        "sampling": scaling,
        "memory_while_growing": growth,
        "service_rows_per_s": service,
        "num_rows": num_rows,
        "actions_per_rollout": list(ACTIONS),
        "insert_rows": list(INSERT_ROWS),
        "sent_rows": SENT_ROWS,
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
    for size in INSERT_ROWS:  # each in a store of its own, so that each pays for the files that its rows fill
        side = open_side(name, folder.with_name(f"{folder.name}-{size}"), num_rows, load)
        found.pack[size], found.insert[size] = _insert(side, size, num_rows, load)
        if size == SENT_ROWS:
            stored_bytes = disk_bytes(side.folder)
            num_drawn = _sample(side, found)
            found.disk_row_bytes = stored_bytes / num_rows
            found.disk_drawn_row_bytes = (disk_bytes(side.folder) - stored_bytes) / num_drawn
        side.close()
    _insert_with_writers(name, folder.with_name(folder.name + "-writers"), num_rows, load, found.writers)
    return found


def _insert(side: Side, size: int, num_rows: int, load: RolloutLoad) -> tuple[_Stopwatch, _Stopwatch]:
    """Fill a store, `size` rows at a time; gives the time of packing and of inserting."""
    pack, insert = _Stopwatch(), _Stopwatch()
    for first in range(0, num_rows, size):
        logs = load.rollouts(first, min(size, num_rows - first))
        pack.start()
        packed = side.pack(logs)
        pack.stop(len(logs))
        insert.start()
        side.insert(packed)
        insert.stop(len(logs))
    return pack, insert


def _sample(side: Side, found: _Found) -> int:
    """Gives the number of rows drawn."""
    for count in DRAWN_ROWS:
        side.sample(count)
        watch = found.sample.setdefault(count, _Stopwatch())
        watch.start()
        for _ in range(DRAWS):
            side.sample(count)
        watch.stop(DRAWS * count)
    found.cold_major_faults = _sample_cold(side, found.cold)
    return (DRAWS + 1) * sum(DRAWN_ROWS) + COLD_DRAWS * DRAWN_ROWS[-1]


def _sample_cold(side: Side, watch: _Stopwatch) -> int:
    """Draws whose rows are not in memory; gives the page faults that read from the disk."""
    before = major_faults()
    for _ in range(COLD_DRAWS):
        drop_page_cache(side.folder)
        watch.start()
        side.sample(DRAWN_ROWS[-1])
        watch.stop(DRAWN_ROWS[-1])
    return major_faults() - before


def _insert_with_writers(name: SideName, folder: Path, num_rows: int, load: RolloutLoad, watch: _Stopwatch) -> None:
    """Several threads that pack and insert."""
    side = open_side(name, folder, num_rows, load)
    share = num_rows // WRITERS

    def write(writer: int) -> None:
        for first in range(writer * share, (writer + 1) * share, SENT_ROWS):
            side.insert(side.pack(load.rollouts(first, min(SENT_ROWS, (writer + 1) * share - first))))

    watch.start()
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write, range(WRITERS)))
    watch.stop(WRITERS * share)
    side.close()


def _ratios(found: dict[SideName, list[_Found]], clock: Clock) -> dict[str, object]:
    """Medians over repetitions of ours over theirs, and under `spread` the smallest and largest of a repetition."""
    medians: dict[str, object] = {}
    spread: dict[str, list[float]] = {}

    def add(key: str, ours: SideName, rival: SideName, of: Callable[[_Found], float]) -> None:
        ratios = [of(mine) / of(theirs) for mine, theirs in zip(found[ours], found[rival], strict=True)]
        medians[key] = round(statistics.median(ratios), 3)
        spread[key] = [round(min(ratios), 3), round(max(ratios), 3)]

    rivals: tuple[SideName, ...] = ("torchrl", "torchrl_hand_padded", "cpprb")
    for rival in rivals:
        for measure in MEASURES:
            short = measure.removesuffix("_warm") + "_ratio"

            def of(one: _Found, measure: Measure = measure) -> float:
                return one.rate(measure, clock)

            add(f"{short}_to_{rival}", "ours", rival, of)
            if measure.startswith("insert"):
                add(f"{short}_to_{rival}_fsync_batch", "ours_fsync_batch", rival, of)
        add(f"disk_ratio_to_{rival}", "ours", rival, lambda one: one.disk_row_bytes)
    return {**medians, "spread": spread}


def _rates(found: dict[SideName, list[_Found]], clock: Clock, per_row: float = 1.0) -> dict[str, dict[str, float]]:
    """Rows per second, or `per_row` times that."""
    return {
        name: {
            measure: round(per_row * statistics.median(one.rate(measure, clock) for one in each))
            for measure in MEASURES
        }
        for name, each in found.items()
    }


def _rates_by_size(found: dict[SideName, list[_Found]], clock: Clock) -> dict[str, dict[str, dict[str, float]]]:
    return {
        name: {
            "insert": {
                str(size): round(statistics.median(one.insert[size].rate(clock, one.pack[size]) for one in each))
                for size in INSERT_ROWS
            },
            "sample": {
                str(count): round(statistics.median(one.sample[count].rate(clock) for one in each))
                for count in DRAWN_ROWS
            },
        }
        for name, each in found.items()
    }


def _row_bytes(load: RolloutLoad) -> float:
    """Mean bytes of a rollout's numbers, unpadded: 4 each for prompt ids, actions, log-probabilities, versions."""
    return statistics.mean(4 * len(log.prompt_ids) + 12 * len(log.actions) for log in load.logs)


def _median(found: list[_Found], of: Callable[[_Found], float]) -> float:
    return statistics.median(of(one) for one in found)
