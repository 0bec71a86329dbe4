"""How old the rollouts were that training drew, from the buffer's consumption log and its stored rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from buffer.reading.reader import BufferSnapshot
from buffer.trajectory.schema import ROW
from buffer.trajectory.staleness import VersionRange, staleness

MAX_BINS = 40
_MICROSECONDS = 1e6
_ROW_BITS = 48

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Histogram:
    """edges: [b+1] ascending; counts: [b]. mean, p95: of the values themselves. unit: of the values."""

    title: str
    unit: str
    caption: str
    edges: list[float]
    counts: list[int]
    mean: float
    p95: float


@dataclass(frozen=True)
class DrawFacts:
    """histograms: none where nothing was drawn. num_lost: draws of rows that are no longer stored, left out of them."""

    histograms: tuple[Histogram, ...]
    num_draws: int
    num_lost: int


def draw_facts(snapshot: BufferSnapshot) -> DrawFacts:
    """Staleness, age and reuse of the drawn policy rollouts, over all shards."""
    events = snapshot.events.filter((pc.field("event") == "draw") & (pc.field("source") == "policy"))
    lengths = pc.list_value_length(events.column("rows")).to_numpy()
    drawn = np.repeat(_shard_keys(events), lengths) + pc.list_flatten(events.column("rows")).to_numpy()
    stored = snapshot.trajectories
    where, known = _find(drawn, _shard_keys(stored) + stored.column(ROW).to_numpy())
    if len(where) == 0:
        return DrawFacts((), len(drawn), len(drawn))
    oldest = np.concatenate(
        [VersionRange.from_batch(batch).oldest for batch in stored.select(["policy_version"]).to_batches()]
    )
    version = np.repeat(events.column("policy_version").to_numpy(), lengths)[known]
    drawn_at = np.repeat(_microseconds(events.column("at")), lengths)[known]
    behind = _staleness(version, oldest[where])
    age = (drawn_at - _microseconds(stored.column("created_at"))[where]) / _MICROSECONDS
    use = np.bincount(where)
    histograms = (
        count_integers("Staleness", "publications", "Weight pushes since a rollout's oldest action.", behind),
        count_reals("Age", "s", "From the end of a rollout to its draw.", age),
        count_integers("Reuse", "draws", "How often a rollout that was drawn at all was drawn.", use[use > 0]),
    )
    return DrawFacts(histograms, len(drawn), len(drawn) - len(where))


def count_integers(title: str, unit: str, caption: str, values: Int64) -> Histogram:
    """Bins that hold equally many integers, each centred on them; values: [n], n > 0."""
    low, high = int(values.min()), int(values.max())
    width = math.ceil((high - low + 1) / MAX_BINS)
    edges = np.arange(low, high + width + 1, width, dtype=np.float64) - 0.5
    return _histogram(title, unit, caption, values.astype(np.float64), edges)


def count_reals(title: str, unit: str, caption: str, values: Float64) -> Histogram:
    """Bins of a round width from 0 (or below it, where clocks of two machines disagree); values: [n], n > 0."""
    low, high = min(0.0, float(values.min())), float(values.max())
    width = round_width((high - low) / MAX_BINS)
    edges = np.arange(math.floor(low / width), math.floor(high / width) + 2, dtype=np.float64) * width
    return _histogram(title, unit, caption, values, edges)


def round_width(least: float) -> float:
    """1, 2 or 5 times a power of ten, not less than `least`; 1 where that is 0."""
    if least <= 0.0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return float(power * next(factor for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= least * (1 - 1e-9)))


def _shard_keys(table: pa.Table) -> Int64:
    """[n] what makes the row numbers of different shards different."""
    keys: Int64 = table.column("shard").to_numpy().astype(np.int64) << _ROW_BITS
    return keys


def _find(drawn: Int64, stored: Int64) -> tuple[Int64, npt.NDArray[np.bool_]]:
    """[k] positions of drawn rows among the ascending `stored` ones, and [n] which of the drawn rows those are."""
    position = np.searchsorted(stored, drawn)
    known = position < len(stored)
    known[known] = stored[position[known]] == drawn[known]
    return position[known], known


def _staleness(policy_version: Int64, oldest: npt.NDArray[np.int32]) -> Int64:
    """[n] as `buffer.trajectory.staleness` has it, each at the version of its own draw."""
    behind = np.zeros(len(oldest), dtype=np.int64)
    for version in np.unique(policy_version).tolist():
        chosen = policy_version == version
        behind[chosen] = staleness(version, oldest[chosen])
    return behind


def _microseconds(times: pa.ChunkedArray) -> Int64:
    values: Int64 = times.cast(pa.int64()).to_numpy()
    return values


def _histogram(title: str, unit: str, caption: str, values: Float64, edges: Float64) -> Histogram:
    counts, _ = np.histogram(values, bins=edges)
    return Histogram(
        title,
        unit,
        caption,
        [float(f"{edge:.10g}") for edge in edges],
        counts.tolist(),
        float(values.mean()),
        float(np.quantile(values, 0.95, method="inverted_cdf")),
    )
