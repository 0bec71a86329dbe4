"""The replay store against TorchRL's and cpprb's buffers: rows per second in and out, and bytes on disk.

All run in this process, one after the other, on the same rollouts of different lengths. An insert begins with finished
rollouts, one array per column and rollout, and ends when the store has them; packing is part of it, since it is where
stores of fixed-size rows pay for padding. TorchRL's users pad with `tensordict.pad_sequence`; `torchrl_hand_padded` is
the same buffer with the quickest padding that numpy has. Inserts without packing are reported as `insert_packed`.
Ratios of inserts are those of as many rows at a time as an actor sends; `rows_per_cpu_s_by_size` has the other sizes.
Draws are so many that what the inserts left to do in the background, beside the first of them, counts for little. Bytes
on disk are those before the first draw; what our record of the draws takes is `disk_bytes_per_drawn_row`.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Annotated, cast, get_args

import typer

from launch.errors import UserError
from tests.benchmarks.backend import Clock, Results, circumstances, measure_in_turn
from tests.benchmarks.buffer_backends import DRAWN_ROWS, INSERT_ROWS, BackendName, StoreBackend
from tests.benchmarks.buffer_growth import memory_while_growing
from tests.benchmarks.buffer_load import ACTIONS, PROMPT_TOKENS, SENT_ROWS, RolloutLoad, make_rollouts
from tests.benchmarks.buffer_service import service_rates
from tests.benchmarks.buffer_size import costs_by_size
from tests.benchmarks.table import Table

TITLES: dict[BackendName, str] = {
    "ours": "ours, fsync=none",
    "ours_fsync_batch": "ours, fsync=batch",
    "torchrl": "TorchRL",
    "torchrl_hand_padded": "TorchRL, hand-padded",
    "cpprb": "cpprb",
}
RIVALS: tuple[BackendName, ...] = ("torchrl", "torchrl_hand_padded", "cpprb")
MEASURES = ("insert", "insert_packed", "insert_4_writers", "sample_warm", "sample_cold")
SCALES = (10_000, 100_000, 1_000_000)
BARS = {"insert_ratio": 3.0, "sample_ratio": 1.5, "disk_ratio": 0.65}


def bench(
    num_rows: Annotated[int, typer.Option("--rows", min=256, help="Rollouts per store and repetition.")] = 20_000,
    repetitions: Annotated[int, typer.Option(min=1, help="Measurements of each store; medians count.")] = 5,
    scales: Annotated[
        list[int], typer.Option("--scale", min=512, help="Live rows at which draws and opening are measured.")
    ] = list(SCALES),  # noqa: B006  # typer copies it
    grow_gib: Annotated[
        float, typer.Option(min=0.0, help="Size to which a store grows while its memory is watched; 0 = not at all.")
    ] = 0.5,
    with_service: Annotated[
        bool, typer.Option("--service", help="Measure our store behind its Ray actor, too.")
    ] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Where the stores put their files; a temporary folder by default.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> dict[str, object]:
    """Compare the replay store with TorchRL's and cpprb's memory-mapped buffers: rows per second, bytes on disk.

    Needs the extra `bench`. In the result, `insert_ratio_to_torchrl` and the like are ours over theirs, medians over
    repetitions, with our `fsync=none` (they have no other); `spread`: smallest and largest ratio of a repetition;
    `by_cpu_time`: the same in time of this process; `bytes_per_s`: of what a rollout holds without padding;
    `sampling.opening_cpu_s`: to open a store, by its live rows.
    """
    for module in ("torchrl", "cpprb"):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"{module} is not installed; it comes with the extra `bench`")
    load = make_rollouts(ACTIONS, PROMPT_TOKENS, seed)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        root = Path(scratch)
        stores = {name: StoreBackend(name, root, num_rows, load) for name in get_args(BackendName)}
        results = measure_in_turn({name: each.measure for name, each in stores.items()}, repetitions)
        scaling = costs_by_size(root / "by-size", scales)
        growth = memory_while_growing(root / "growth", int(grow_gib * 2**30)) if grow_gib else []
        service = service_rates(root / "service", num_rows) if with_service else None
    return {
        **_ratios(results, stores, "wall_s"),
        "by_cpu_time": _ratios(results, stores, "cpu_s"),
        "rows_per_s": _rates(results, "wall_s"),
        "rows_per_cpu_s": _rates(results, "cpu_s"),
        "bytes_per_s": _rates(results, "wall_s", _row_bytes(load)),
        "rows_per_cpu_s_by_size": {
            name: {
                "insert": {str(size): round(results.rate(name, f"insert_{size}", "cpu_s")) for size in INSERT_ROWS},
                "sample": {str(size): round(results.rate(name, f"sample_warm_{size}", "cpu_s")) for size in DRAWN_ROWS},
            }
            for name in stores
        },
        "disk_bytes_per_row": {name: round(median(each.disk_row_bytes)) for name, each in stores.items()},
        "disk_bytes_per_drawn_row": {
            name: round(median(each.disk_drawn_row_bytes), 2) for name, each in stores.items()
        },
        "cold_major_faults": {name: median(each.cold_major_faults) for name, each in stores.items()},
        "sampling": scaling,
        "memory_while_growing": growth,
        "service_rows_per_s": service,
        "num_rows": num_rows,
        "actions_per_rollout": list(ACTIONS),
        "insert_rows": list(INSERT_ROWS),
        "sent_rows": SENT_ROWS,
        "drawn_rows": list(DRAWN_ROWS),
        "page_cache": "inserts: new files, written back by the kernel; warm: as the inserts left it; cold: dropped",
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {name: version(name) for name in ("pyarrow", "torch", "torchrl", "cpprb")},
        **circumstances(repetitions=repetitions, seed=seed),
    }


def _ratios(results: Results, stores: Mapping[BackendName, StoreBackend], clock: Clock) -> dict[str, object]:
    """Of ours over theirs; `spread`: smallest and largest of a repetition."""
    ratios: dict[str, Sequence[float]] = {}
    for rival in RIVALS:
        for measure in MEASURES:
            key = f"{measure.removesuffix('_warm')}_ratio_to_{rival}"
            ratios[key] = results.ratios("ours", rival, measure, clock)
            if measure.startswith("insert"):
                ratios[f"{key}_fsync_batch"] = results.ratios("ours_fsync_batch", rival, measure, clock)
        both = zip(stores["ours"].disk_row_bytes, stores[rival].disk_row_bytes, strict=True)
        ratios[f"disk_ratio_to_{rival}"] = [ours / theirs for ours, theirs in both]
    spread = {key: [round(min(each), 3), round(max(each), 3)] for key, each in ratios.items()}
    return {key: round(median(each), 3) for key, each in ratios.items()} | {"spread": spread}


def _rates(results: Results, clock: Clock, per_row: float = 1.0) -> dict[str, dict[str, float]]:
    """Rows per second, or `per_row` times that."""
    return {
        name: {measure: round(per_row * results.rate(name, measure, clock)) for measure in MEASURES}
        for name in results.found
    }


def _row_bytes(load: RolloutLoad) -> float:
    """Mean bytes of a rollout's numbers, unpadded: 4 each for prompt ids, actions, log-probabilities, versions."""
    return mean(4 * len(log.prompt_ids) + 12 * len(log.actions) for log in load.logs)


def table(found: dict[str, object]) -> Table:
    """Rows per second of each store, the ratios with their bars, and costs by size."""
    rates = cast(dict[str, dict[str, float]], found["rows_per_s"])
    disk = cast(dict[str, float], found["disk_bytes_per_row"])
    by_cpu = cast(dict[str, float], found["by_cpu_time"])
    spread = cast(dict[str, dict[str, list[float]]], found["by_cpu_time"])["spread"]
    notes = []
    for name, bar in BARS.items():
        key = f"{name}_to_torchrl"
        low, high = spread[key]
        notes.append(f"{key}, by CPU time: {by_cpu[key]:.2f} ({low:.2f} to {high:.2f}; bar {bar:g})")
    by_size = cast(dict[str, dict[str, float]], found["sampling"])
    notes += [
        f"{title}: {', '.join(f'{cost:.2f} {unit} at {int(rows):,}' for rows, cost in by_size[key].items())}"
        for key, title, unit in (
            ("draw_ms", "a draw by live rows", "ms"),
            ("opening_cpu_s", "opening by live rows", "s of CPU"),
        )
    ]
    notes += [
        f"memory at {point['disk_mib']:,.0f} MiB on disk: {point['anonymous_mib']:,.0f} MiB"
        for point in cast(list[dict[str, float]], found["memory_while_growing"])[-1:]
    ]
    service = cast(dict[str, float] | None, found["service_rows_per_s"]) or {}
    notes += [f"behind its Ray actor, {name}: {rate:,.0f} rows/s" for name, rate in service.items()]
    return Table(
        ("rows/s", "insert", "packed", "4 writers", "sample", "cold", "bytes/row"),
        [
            (title, *(f"{rates[name][measure]:,.0f}" for measure in MEASURES), f"{disk[name]:,.0f}")
            for name, title in TITLES.items()
        ],
        ["TorchRL and cpprb are memory-mapped", *notes, f"load average {found['load_average']}"],
    )
