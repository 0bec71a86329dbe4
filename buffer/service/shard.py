"""The folders of a buffer's shards, and the messages between a shard and its clients.

    RUN/buffer/shard-000/  shard-001/  ...      one folder per shard, also if there is only one

Each shard gets an equal fraction of the capacity and of `min_size`, so the settings of a run mean the same with any
number of shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from buffer.settings import BufferSettings
from buffer.store.shard import SampleKey, SourceCounters, StoreStatus
from buffer.trajectory.schema import SOURCES
from buffer.trajectory.validation import Rejection

_FOLDER_PREFIX = "shard-"


def shard_folder(buffer_folder: Path, index: int) -> Path:
    """Folder of a shard of the buffer in `buffer_folder`."""
    return buffer_folder / f"{_FOLDER_PREFIX}{index:03d}"


def present_shards(buffer_folder: Path) -> list[Path]:
    """Folders of the shards that exist, in their order; none before the run has made one."""
    return sorted(path for path in buffer_folder.glob(f"{_FOLDER_PREFIX}*") if path.is_dir())


def shard_settings(settings: BufferSettings, index: int) -> BufferSettings:
    """Settings of one shard: its fraction of each number of rows, rounded up, and its own port."""
    shards, tolerance, flight = settings.shards, settings.samples_per_insert_tolerance, settings.flight
    return settings.model_copy(
        update={
            "capacity": -(-settings.capacity // shards),
            "min_size": -(-settings.min_size // shards),
            "samples_per_insert_tolerance": None if tolerance is None else tolerance / shards,
            "flight": flight.model_copy(update={"port": flight.port + index if flight.port else 0}),
        }
    )


def shard_seed(seed: int, index: int) -> int:
    """Seed of a shard's samples; the first shard has the seed of the run."""
    return seed + (index << 32)


@dataclass(frozen=True)
class InsertReply:
    """accepted: rows that are stored, by this insert or by an earlier one that it repeats; rejections: the other rows,
    with reasons; pause: call `wait_for_demand` before the next rollout."""

    accepted: int
    rejections: tuple[Rejection, ...]
    pause: bool


@dataclass(frozen=True)
class SampleRequest:
    """Asks for a sample.

    count: rows, of all shards together. policy_version: newest version that the learner has published.
    first_version: first weights of the stage; rows with older actions belong to another stage.
    """

    key: SampleKey
    count: int
    policy_version: int
    first_version: int = 0


@dataclass(frozen=True)
class Offer:
    """How many rows one shard can give to one sample.

    logged: rows that the catalog has for this sample. live: live rows of the sample's source.
    available: rows that it could add now; at most the live rows that it has not logged, fewer where its limiter
        requires that.
    inserts: inserts that it has stored; `wait_for_rows` waits for more.
    shortage: why it cannot give the whole sample, as text for users.
    """

    logged: int
    live: int
    available: int
    inserts: int
    shortage: str = ""


def plan_parts(count: int, offers: Sequence[Offer]) -> list[int] | None:
    """Rows that each shard gives to a sample of `count`, logged ones included; None while there are too few."""
    missing = count - sum(offer.logged for offer in offers)
    assert missing >= 0, "a shard refuses a sample that had another size before"
    added = split(missing, [offer.live for offer in offers], [offer.available for offer in offers])
    return None if added is None else [offer.logged + part for offer, part in zip(offers, added, strict=True)]


def split(count: int, weights: Sequence[int], limits: Sequence[int]) -> list[int] | None:
    """Divide `count` in proportion to `weights`, in whole numbers, no part above its limit; None where the limits add
    up to less. The excess of a limited part is divided among the others in the same way."""
    assert all(limit <= weight for limit, weight in zip(limits, weights, strict=True)), "no part without weight"
    if sum(limits) < count:
        return None
    parts = [0] * len(weights)
    free = [index for index, limit in enumerate(limits) if limit > 0]
    while True:
        missing, total = count - sum(parts), sum(weights[index] for index in free)
        full = [index for index in free if missing * weights[index] > limits[index] * total]
        if not full:
            break
        for index in full:
            parts[index] = limits[index]
        free = [index for index in free if index not in full]
    # The rounded ends of the parts side by side: each part is its exact size, rounded up or down.
    ends = [missing * weight // total for weight in accumulate(weights[index] for index in free)]
    for index, (begin, end) in zip(free, pairwise([0, *ends]), strict=True):
        parts[index] = end - begin
    return parts


@dataclass(frozen=True)
class ShardStatus:
    """State of one shard.

    capacity: live rows per source, at most. actors_paused: inserts are too far ahead of samples. waiting_samples:
    samples of the learner that wait. pid, host: of its process; up_s: seconds since the process started.
    flight: address of its Arrow Flight endpoint.
    """

    store: StoreStatus
    capacity: int
    actors_paused: bool
    waiting_samples: int
    pid: int
    host: str
    up_s: float
    flight: str | None = None

    @property
    def state(self) -> str:
        """A short text for users."""
        if self.waiting_samples:
            return "awaiting rows"
        return "ahead of the learner" if self.actors_paused else "serving"

    @property
    def troubles(self) -> list[str]:
        """Problems of its folder, as texts for users."""
        parts = [] if self.store.maintenance_error is None else [self.store.maintenance_error]
        if self.store.quarantined:
            parts.append(f"damaged and put aside: {', '.join(self.store.quarantined)}")
        return parts


@dataclass(frozen=True)
class BufferStatus:
    """State of the whole buffer. shards: None for a shard that did not answer, since it is starting."""

    shards: tuple[ShardStatus | None, ...]

    @property
    def answering(self) -> list[ShardStatus]:
        """Status of the shards that answered."""
        return [shard for shard in self.shards if shard is not None]

    @property
    def sources(self) -> dict[str, SourceCounters]:
        """Counters by source, summed over the shards that answered; the newest sample is that of the first of them."""
        stores = [shard.store for shard in self.answering]
        return {source: _total([store.sources[source] for store in stores]) for source in SOURCES} if stores else {}

    @property
    def waiting_samples(self) -> int:
        """Largest number of waiting samples in one shard."""
        return max((shard.waiting_samples for shard in self.answering), default=0)

    def summary(self) -> str:
        """One line for users."""
        parts = []
        for source, counters in self.sources.items():
            if counters.inserted == 0:
                continue
            line = (
                f"{counters.live:,} {source} trajectories live of {counters.inserted:,}, {counters.sampled:,} sampled"
            )
            if counters.replayed:
                line += f", {counters.replayed:,} sampled again"
            if counters.dropped_stale:
                line += f", {counters.dropped_stale:,} stale"
            if source == "policy" and counters.last_sample is not None:
                line += f", staleness {counters.last_sample.staleness_mean:.1f}"
            parts.append(line)
        if rejected := sum(shard.store.rejected for shard in self.answering):
            parts.append(f"{rejected:,} rejected")
        for index, shard in enumerate(self.shards):
            troubles = ["does not answer"] if shard is None else shard.troubles
            parts += [f"shard {index}: {trouble}" for trouble in troubles]
        return "buffer: " + ("; ".join(parts) or "empty")


def _total(counters: list[SourceCounters]) -> SourceCounters:
    return SourceCounters(
        inserted=sum(each.inserted for each in counters),
        live=sum(each.live for each in counters),
        removed=dict(sum((Counter(each.removed) for each in counters), Counter())),
        sample_calls=max(each.sample_calls for each in counters),
        sampled=sum(each.sampled for each in counters),
        replayed=sum(each.replayed for each in counters),
        last_sample=next((each.last_sample for each in counters if each.last_sample is not None), None),
    )
