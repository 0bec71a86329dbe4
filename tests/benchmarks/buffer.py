"""The replay store against TorchRL's and cpprb's buffers: rows per second in and out, and bytes on disk.

All run in this process, one after the other, on the same rollouts of different lengths. An insert begins with finished
rollouts, one array per column and rollout, and ends when the store has them; packing is part of it, since it is where
stores of fixed-size rows pay for padding. TorchRL's users pad with `tensordict.pad_sequence`; `torchrl_hand_padded` is
the same buffer with the quickest padding that numpy has. Inserts without packing are reported as `insert_packed`.
Ratios of inserts are those of as many rows at a time as an actor sends; `rows_per_cpu_s_by_size` has the other sizes.
Draws are so many that what the inserts left to do in the background, beside the first of them, counts for little. Bytes
on disk are those before the first draw; what our record of the draws takes is `disk_bytes_per_sampled_row`.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Annotated, get_args

import typer

from launch.errors import UserError
from tests.benchmarks.backend import Clock, Repetitions, Results, Seed, circumstances, measure_in_turn
from tests.benchmarks.buffer_costs import costs_by_size, memory_while_growing, service_rates
from tests.benchmarks.buffer_load import ACTIONS, SENT_ROWS, make_rollouts
from tests.benchmarks.buffer_stores import DRAWN_ROWS, INSERT_SIZES, StoreBackend, StoreName

RIVALS: tuple[StoreName, ...] = ("torchrl", "torchrl_hand_padded", "cpprb")
MEASURES = ("insert", "insert_packed", "insert_4_writers", "sample_warm", "sample_cold")
SCALES = [10_000, 100_000, 1_000_000]
SHOWN = {
    "rows_per_s": "ours: fsync=none; TorchRL and cpprb are memory-mapped",
    "disk_bytes_per_row": "",
    "by_cpu_time.insert_ratio_to_torchrl": "at least 3",
    "by_cpu_time.sample_ratio_to_torchrl": "at least 1.5",
    "by_cpu_time.disk_ratio_to_torchrl": "at most 0.65",
    "sampling.sample_ms": "CPU time by live rows",
    "sampling.opening_cpu_s": "by live rows; at most 2 at 1,000,000",
    "memory_while_growing": "",
    "service_rows_per_s": "behind its Ray actor, with --service",
    "load_average": "",
}


def bench(
    rows: Annotated[int, typer.Option(min=256, help="Rollouts per store and repetition.")] = 20_000,
    repetitions: Repetitions = 5,
    scale: Annotated[
        list[int], typer.Option(min=512, help="Live rows at which draws and opening are measured.")
    ] = SCALES,
    grow_gib: Annotated[
        float, typer.Option(min=0.0, help="Size to which a store grows while its memory is watched; 0 = not at all.")
    ] = 0.5,
    service: Annotated[bool, typer.Option("--service", help="Measure our store behind its Ray actor, too.")] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Where the stores put their files; a temporary folder by default.")
    ] = None,
    seed: Seed = 0,
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
    rollouts = make_rollouts(seed)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        root = Path(scratch)
        stores = {name: StoreBackend(name, root, rows, rollouts) for name in get_args(StoreName)}
        results = measure_in_turn({name: each.measure for name, each in stores.items()}, repetitions)
        sampling = costs_by_size(root / "by-size", scale)
        growth = memory_while_growing(root / "growth", int(grow_gib * 2**30)) if grow_gib else []
        service_rows_per_s = service_rates(root / "service", rows) if service else None
    row_bytes = mean(4 * len(log.prompt_ids) + 12 * len(log.actions) for log in rollouts)
    return {
        **_ratios(results, stores, "wall_s"),
        "by_cpu_time": _ratios(results, stores, "cpu_s"),
        "rows_per_s": _rates(results, "wall_s"),
        "rows_per_cpu_s": _rates(results, "cpu_s"),
        "bytes_per_s": _rates(results, "wall_s", row_bytes),
        "rows_per_cpu_s_by_size": {
            name: {
                kind: {str(size): round(results.medians(f"{work}_{size}", "cpu_s")[name]) for size in sizes}
                for kind, work, sizes in (("insert", "insert", INSERT_SIZES), ("sample", "sample_warm", DRAWN_ROWS))
            }
            for name in stores
        },
        **{
            noted: {name: round(median(each.noted[noted]), digits) for name, each in stores.items()}
            for noted, digits in (
                ("disk_bytes_per_row", None),
                ("disk_bytes_per_sampled_row", 2),
                ("cold_major_faults", 1),
            )
        },
        "sampling": sampling,
        "memory_while_growing": growth,
        "service_rows_per_s": service_rows_per_s,
        "num_rows": rows,
        "actions_per_rollout": list(ACTIONS),
        "insert_batch_size": list(INSERT_SIZES),
        "sent_rows": SENT_ROWS,
        "sampled_rows": list(DRAWN_ROWS),
        "page_cache": "inserts: new files, written back by the kernel; warm: as the inserts left it; cold: dropped",
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {name: version(name) for name in ("pyarrow", "torch", "torchrl", "cpprb")},
        **circumstances(repetitions=repetitions, seeds=[seed]),
    }


def _ratios(results: Results, stores: Mapping[StoreName, StoreBackend], clock: Clock) -> dict[str, object]:
    """Of ours over theirs; `spread`: smallest and largest of a repetition."""
    ratios: dict[str, Sequence[float]] = {}
    for rival in RIVALS:
        for measure in MEASURES:
            key = f"{measure.removesuffix('_warm')}_ratio_to_{rival}"
            ratios[key] = results.ratios("ours", rival, measure, clock)
            if measure.startswith("insert"):
                ratios[f"{key}_fsync_batch"] = results.ratios("ours_fsync_batch", rival, measure, clock)
        both = zip(*(stores[name].noted["disk_bytes_per_row"] for name in ("ours", rival)), strict=True)
        ratios[f"disk_ratio_to_{rival}"] = [ours / theirs for ours, theirs in both]
    spread = {key: [round(min(each), 3), round(max(each), 3)] for key, each in ratios.items()}
    return {key: round(median(each), 3) for key, each in ratios.items()} | {"spread": spread}


def _rates(results: Results, clock: Clock, per_row: float = 1.0) -> dict[str, dict[str, float]]:
    """Rows per second, or `per_row` times that."""
    medians = {measure: results.medians(measure, clock) for measure in MEASURES}
    return {name: {measure: round(per_row * medians[measure][name]) for measure in MEASURES} for name in results.found}
