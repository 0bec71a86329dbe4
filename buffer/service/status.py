"""What the replay buffer of a run tells of itself: one status for each shard, and their sum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from buffer.store.results import SourceCounters, StoreStatus
from buffer.trajectory.schema import SOURCES
from buffer.trajectory.validation import Rejection


@dataclass(frozen=True)
class ShardStatus:
    """State of one shard.

    capacity: live rows per source, at most. actors_paused: they are ahead of the draws. waiting_draws: of the learner.
    recent_rejections: the last few, newest last. pid, host: of its process; up_s: seconds since that one started.
    flight: address of its Arrow Flight endpoint, None where it has none.
    """

    store: StoreStatus
    capacity: int
    actors_paused: bool
    waiting_draws: int
    recent_rejections: tuple[Rejection, ...]
    pid: int
    host: str
    up_s: float
    flight: str | None = None

    @property
    def state(self) -> str:
        """One word or two for people."""
        if self.waiting_draws:
            return "awaiting rows"
        return "ahead of the learner" if self.actors_paused else "serving"

    @property
    def troubles(self) -> list[str]:
        """What somebody should know of its folder."""
        parts = [] if self.store.upkeep_error is None else [self.store.upkeep_error]
        if self.store.quarantined:
            parts.append(f"damaged and put aside: {', '.join(self.store.quarantined)}")
        return parts


@dataclass(frozen=True)
class BufferStatus:
    """State of the whole buffer. shards: None for one that did not answer: it is starting, or being restarted."""

    shards: tuple[ShardStatus | None, ...]

    @property
    def answering(self) -> list[ShardStatus]:
        """Status of the shards that answered."""
        return [shard for shard in self.shards if shard is not None]

    @property
    def sources(self) -> dict[str, SourceCounters]:
        """Counters by source, summed over the shards that answered."""
        return {
            source: _total([shard.store.sources[source] for shard in self.answering])
            for source in SOURCES
            if self.answering
        }

    @property
    def rejected(self) -> int:
        """Trajectories refused at the door."""
        return sum(shard.store.rejected for shard in self.answering)

    @property
    def waiting_draws(self) -> int:
        """Draws that wait in some shard."""
        return max((shard.waiting_draws for shard in self.answering), default=0)

    def summary(self) -> str:
        """One line for people."""
        parts = []
        for source, counters in self.sources.items():
            if counters.inserted == 0:
                continue
            line = f"{counters.live:,} {source} trajectories live of {counters.inserted:,}, {counters.drawn:,} drawn"
            if counters.replayed:
                line += f", {counters.replayed:,} drawn again"
            if counters.dropped_stale:
                line += f", {counters.dropped_stale:,} stale"
            if source == "policy" and counters.last_draw is not None:
                line += f", staleness {counters.last_draw.staleness_mean:.1f}"
            parts.append(line)
        if self.rejected:
            parts.append(f"{self.rejected:,} rejected")
        for index, shard in enumerate(self.shards):
            troubles = ["does not answer"] if shard is None else shard.troubles
            parts += [f"shard {index}: {trouble}" for trouble in troubles]
        return "buffer: " + ("; ".join(parts) or "empty")


def _total(counters: Sequence[SourceCounters]) -> SourceCounters:
    """The sum; the statistics are those of the first shard that gave rows to a draw."""
    return SourceCounters(
        inserted=sum(each.inserted for each in counters),
        live=sum(each.live for each in counters),
        removed=dict(sum((Counter(each.removed) for each in counters), Counter())),
        draws=max(each.draws for each in counters),
        drawn=sum(each.drawn for each in counters),
        replayed=sum(each.replayed for each in counters),
        last_draw=next((each.last_draw for each in counters if each.last_draw is not None), None),
    )
