"""The metrics of a run, read from its folder while the run goes on, or after it (names: docs/metrics.md)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from launch.errors import UserError
from launch.run_folder.folder import METRICS_FILE

KEYS = pa.schema([("time", pa.float64()), ("stage", pa.string()), ("step", pa.int64())])
"""The columns that every line has."""


def metrics_table(run: Path) -> pa.Table:
    """A row per step: `KEYS`, then a column per metric, null where a step has no such metric. Stages are in the order
    in which they began.

    Of two lines of one stage and step the later one counts (see `learner.metrics.log`); half a line at the end is left
    out. UserError: a complete line is no JSON object.
    """
    path = run / METRICS_FILE
    content = path.read_bytes() if path.is_file() else b""
    content = content[: content.rfind(b"\n") + 1]
    if not content:
        return KEYS.empty_table()
    try:
        table = pa.json.read_json(pa.BufferReader(content), parse_options=pa.json.ParseOptions(explicit_schema=KEYS))
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    stages = [table.filter(pc.equal(table.column("stage"), stage)) for stage in pc.unique(table.column("stage"))]
    return pa.concat_tables(map(_newest_lines, stages))


def _newest_lines(rows: pa.Table) -> pa.Table:
    """The last line of each step, steps ascending."""
    logged = rows.column("step").to_numpy()
    _, newest = np.unique(logged[::-1], return_index=True)
    return rows.take(len(logged) - 1 - newest)
