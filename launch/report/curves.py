"""Curves of a run's metrics, thinned to what a chart can show without losing a spike."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from launch.errors import UserError
from launch.run_folder.folder import METRICS_FILE

BUCKETS = 220
"""Points of a curve, at most; a chart is a few hundred pixels wide."""

_NOT_METRICS = ("time", "stage", "step")
_SIGNIFICANT_DIGITS = 4
_BLOCK_BYTES = 1 << 16
_KEYS = pa.schema([("time", pa.float64()), ("stage", pa.string()), ("step", pa.int64())])

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Curve:
    """One metric in one stage, in buckets of consecutive steps.

    steps: last step of each bucket. mean, low, high: of the bucket's finite values, None where it has none; `low` and
    `high` are empty where each bucket is a single step.
    """

    stage: str
    metric: str
    steps: list[int]
    mean: list[float | None]
    low: list[float | None]
    high: list[float | None]

    def end(self) -> float | None:
        """Mean over the last tenth of the steps: a single step is noise. None where no value there is finite."""
        values = [value for value in self.mean[-max(1, len(self.mean) // 10) :] if value is not None]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class StageRows:
    """The steps of one stage that were logged. steps: [n] ascending; times: [n] seconds since 1970; busy_s: their
    durations added up.
    """

    stage: str
    steps: Int64
    times: Float64
    busy_s: float
    curves: dict[str, Curve]


def read_stages(run: Path) -> list[StageRows]:
    """The stages of `metrics.jsonl` in the order in which they began; none where there is no line yet.

    Of two lines of one stage and step the later one counts (see `learner.metrics.log`).

    Raises:
        UserError: a complete line is no JSON object. OSError: the file cannot be read.
    """
    table = _read_lines(run / METRICS_FILE)
    return [_stage_rows(table, stage) for stage in pc.unique(table.column("stage")).to_pylist()]


def thin(stage: str, metric: str, steps: Int64, values: Float64) -> Curve:
    """The curve of `values` [n] at ascending `steps` [n]."""
    if len(steps) <= BUCKETS:
        return Curve(stage, metric, steps.tolist(), _rounded(values), [], [])
    starts = np.linspace(0, len(steps), BUCKETS, endpoint=False).astype(np.int64)
    finite = np.isfinite(values)
    known = np.where(finite, values, np.nan)
    counts = np.add.reduceat(finite.astype(np.float64), starts)
    sums = np.add.reduceat(np.where(finite, values, 0.0), starts)
    mean = np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0)
    return Curve(
        stage,
        metric,
        steps[np.append(starts[1:], len(steps)) - 1].tolist(),
        _rounded(mean),
        _rounded(np.fmin.reduceat(known, starts)),
        _rounded(np.fmax.reduceat(known, starts)),
    )


def _read_lines(path: Path) -> pa.Table:
    if not path.is_file() or (size_bytes := _complete_bytes(path)) == 0:
        return _KEYS.empty_table()
    with pa.memory_map(str(path)) as mapped:
        lines = pa.BufferReader(mapped.read_buffer(size_bytes))
        try:
            return pa.json.read_json(lines, parse_options=pa.json.ParseOptions(explicit_schema=_KEYS))
        except pa.ArrowInvalid as error:
            raise UserError(f"{path} cannot be read: {error}") from None


def _complete_bytes(path: Path) -> int:
    """Size of the complete lines; a run that is being written may end in a part of one."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - _BLOCK_BYTES)
            file.seek(start)
            if found := file.read(end - start).rfind(b"\n") + 1:
                return start + found
            end = start
    return 0


def _stage_rows(table: pa.Table, stage: str) -> StageRows:
    rows = table.filter(pc.equal(table.column("stage"), stage))
    logged = rows.column("step").to_numpy()
    steps, newest = np.unique(logged[::-1], return_index=True)
    rows = rows.take(len(logged) - 1 - newest)
    curves = {}
    for name in rows.column_names:
        column = rows.column(name)
        if name not in _NOT_METRICS and column.null_count < len(column):
            values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
            curves[name] = thin(stage, name, steps, values)
    busy_s = pc.sum(rows.column("step_s")).as_py() if "step_s" in rows.column_names else None
    return StageRows(stage, steps, rows.column("time").to_numpy(), busy_s or 0.0, curves)


def _rounded(values: Float64) -> list[float | None]:
    return [
        float(f"{value:.{_SIGNIFICANT_DIGITS}g}") if known else None
        for value, known in zip(values.tolist(), np.isfinite(values).tolist(), strict=True)
    ]
