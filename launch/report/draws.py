"""How old the rollouts were that training sampled, from the buffer's consumption log and its stored rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from buffer.reading.reader import BufferSnapshot
from buffer.trajectory.schema import ROW
from buffer.trajectory.staleness import VersionRange, staleness
from launch.report.formatting import number
from launch.report.plots import Plot, Series

MAX_BINS = 40
_MICROSECONDS = 1e6
_ROW_BITS = 48

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class DrawFacts:
    """plots: none where nothing was drawn. num_lost: draws of rows that are no longer stored, left out of the plots."""

    plots: tuple[Plot, ...]
    num_draws: int
    num_lost: int


def draw_facts(snapshot: BufferSnapshot) -> DrawFacts:
    """Staleness, age and reuse of the sampled policy rollouts, over all shards."""
    events = snapshot.events.filter((pc.field("event") == "draw") & (pc.field("source") == "policy"))
    lengths = pc.list_value_length(events.column("rows")).to_numpy()
    drawn = np.repeat(_shard_keys(events), lengths) + pc.list_flatten(events.column("rows")).to_numpy()
    stored = snapshot.trajectories
    keys = _shard_keys(stored) + stored.column(ROW).to_numpy()  # ascending
    places = np.searchsorted(keys, drawn)
    known = places < len(keys)
    known[known] = keys[places[known]] == drawn[known]
    places = places[known]
    if len(places) == 0:
        return DrawFacts((), len(drawn), len(drawn))
    versions = stored.select(["policy_version"]).to_batches()
    oldest = np.concatenate([VersionRange.from_batch(batch).oldest for batch in versions])
    version = np.repeat(events.column("policy_version").to_numpy(), lengths)[known]
    behind = staleness(version, oldest[places])
    age_us = np.repeat(_microseconds(events.column("at")), lengths)[known]
    age_us -= _microseconds(stored.column("created_at"))[places]
    uses = np.bincount(places)
    plots = (
        histogram("Staleness", "publications", "Weight pushes since a rollout's oldest action.", behind, whole=True),
        histogram("Age", "s", "From the end of a rollout to its draw.", age_us / _MICROSECONDS),
        histogram("Reuse", "draws", "How often a rollout that was drawn at all was drawn.", uses[uses > 0], whole=True),
    )
    return DrawFacts(plots, len(drawn), len(drawn) - len(places))


def histogram(title: str, unit: str, caption: str, values: Int64 | Float64, whole: bool = False) -> Plot:
    """Bins of a round width for `values` [n], n > 0; those of whole numbers are centered on them."""
    from matplotlib.ticker import MaxNLocator

    low, high = float(values.min()), float(values.max())
    locator = MaxNLocator(MAX_BINS, steps=[1, 2, 5, 10], integer=whole)
    ticks = np.asarray(locator.tick_values(low, high + 1.0) if whole else locator.tick_values(min(0.0, low), high))
    edges = ticks - 0.5 if whole else ticks
    counts, _ = np.histogram(values, bins=edges)
    percentile = float(np.quantile(values, 0.95, method="inverted_cdf"))
    summary = f"{caption} Mean {number(float(values.mean()))}, 95 % at most {number(percentile)}."
    series = Series("rollouts" if unit == "draws" else "draws", edges.tolist(), counts.tolist())
    return Plot(title, unit, summary, unit, (series,), "bars")


def _shard_keys(table: pa.Table) -> Int64:
    """[n] what makes the row numbers of different shards different."""
    keys: Int64 = table.column("shard").to_numpy().astype(np.int64) << _ROW_BITS
    return keys


def _microseconds(times: pa.ChunkedArray) -> Int64:
    values: Int64 = times.cast(pa.int64()).to_numpy().copy()
    return values
