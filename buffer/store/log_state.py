"""What the events of one log file add up to: the state that a store opens with, next to the rows in its segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from buffer.sampling.lane import LaneSnapshot
from buffer.store.counters import Tally
from buffer.store.events import Event
from buffer.store.row_numbers import NO_ROWS, Int64
from buffer.trajectory.schema import SOURCES

Float32 = npt.NDArray[np.float32]
_T = TypeVar("_T")


@dataclass(frozen=True)
class DrawKey:
    """Names one draw of a run. step: steps of the stage that were done before it."""

    stage: str
    step: int
    source: str


@dataclass(frozen=True)
class LoggedDraw:
    """What this shard gave to a draw: row numbers, in order. policy_version: newest version known then; whole: rows of
    the draw over all shards."""

    key: DrawKey
    policy_version: int
    rows: Int64
    whole: int

    def extended_by(self, more: LoggedDraw) -> LoggedDraw:
        """With the rows that completed the part of this shard after an interruption."""
        return replace(more, rows=np.concatenate([self.rows, more.rows]))

    def to_event(self, again: bool = False) -> Event:
        """again: whether an earlier file of the log has the draw."""
        return Event(
            "pinned" if again else "draw",
            stage=self.key.stage,
            step=self.key.step,
            source=self.key.source,
            policy_version=self.policy_version,
            rows=self.rows,
            whole=self.whole,
        )


@dataclass(frozen=True)
class SourceSnapshot:
    """One source at the time of a snapshot."""

    lane: LaneSnapshot
    tally: Tally


@dataclass(frozen=True)
class LogSnapshot:
    """All that a file of the log begins with, but for the draws that can be repeated.

    next_row: no row had this number or a higher one. first_version: of the stage. lost: rows of unknown source.
    """

    sources: dict[str, SourceSnapshot]
    next_row: int = 0
    newest_version: int = -1
    first_version: int = 0
    rejected: int = 0
    lost: int = 0

    @classmethod
    def empty(cls) -> LogSnapshot:
        """Of a new folder."""
        lane = LaneSnapshot(NO_ROWS, NO_ROWS.astype(np.int32), None)
        return cls({source: SourceSnapshot(lane, Tally()) for source in SOURCES})

    def to_events(self) -> list[Event]:
        """One of the shard, one per source."""
        shard = replace(
            Tally(inserted=self.lost).to_counters(),
            dropped_quarantine=self.lost,
            next_row=self.next_row,
            newest_version=self.newest_version,
            first_version=self.first_version,
            rejected=self.rejected,
        )
        return [
            Event("snapshot", counters=shard),
            *(
                Event(
                    "snapshot",
                    source=source,
                    rows=each.lane.rows,
                    times_sampled=each.lane.times_sampled,
                    priorities=each.lane.priorities,
                    counters=each.tally.to_counters(),
                )
                for source, each in self.sources.items()
            ),
        ]


@dataclass
class SourceState:
    """One source: its snapshot, and what the file says happened since.

    tally: of now, but for the rows inserted since, which the log learns of when their segment is sealed.
    """

    lane: LaneSnapshot
    tally: Tally
    sealed: list[Int64] = field(default_factory=list)
    removed: list[Int64] = field(default_factory=list)
    drawn: list[Int64] = field(default_factory=list)
    priorities: list[tuple[Int64, Float32]] = field(default_factory=list)


class LogState:
    """The events of a file, applied one after the other."""

    def __init__(self) -> None:
        self.next_row = 0
        self.newest_version = -1
        self.first_version = 0
        self.rejected = 0
        self.lost = 0
        self.lost_rows: list[Int64] = []  # since the snapshot
        self.sources: dict[str, SourceState] = {}
        self.draws: dict[DrawKey, LoggedDraw] = {}
        self.removed_ids: list[tuple[Int64, pa.StringArray]] = []
        self.last_row = -1  # highest number that any event names

    def apply(self, events: Sequence[Event]) -> None:
        """Go on with these events."""
        for event in events:
            if event.rows is not None and len(event.rows):
                self.last_row = max(self.last_row, int(event.rows.max()))
            if event.policy_version is not None and event.kind != "stage":
                self.newest_version = max(self.newest_version, event.policy_version)
            self._apply(event)

    def _apply(self, event: Event) -> None:
        match event.kind:
            case "snapshot":
                self._begin(event)
            case "draw" | "pinned":
                self._draw(event)
            case "checkpoint":
                self.draws = release(self.draws, _given(event.stage), _given(event.step))
            case "stage":
                self.first_version = _given(event.policy_version)
            case "seal":
                self.sources[_given(event.source)].sealed.append(_given(event.rows))
            case "remove":
                self._remove(event)
            case "reject":
                self.rejected += len(_given(event.ids))
            case "priorities":
                state = self.sources[_given(event.source)]
                state.priorities.append((_given(event.rows), _given(event.priorities)))
            case "version":
                pass  # `apply` takes the version of every event

    def _begin(self, event: Event) -> None:
        counters = _given(event.counters)
        if event.source is not None:
            lane = LaneSnapshot(_given(event.rows), _given(event.times_sampled), event.priorities)
            self.sources[event.source] = SourceState(lane, Tally.from_counters(counters))
            return
        self.next_row = _given(counters.next_row)
        self.newest_version = _given(counters.newest_version)
        self.first_version = _given(counters.first_version)
        self.rejected = _given(counters.rejected)
        self.lost = _given(counters.inserted)

    def _draw(self, event: Event) -> None:
        key = DrawKey(_given(event.stage), _given(event.step), _given(event.source))
        draw = LoggedDraw(key, _given(event.policy_version), _given(event.rows).copy(), _given(event.whole))
        before = self.draws.get(key)
        self.draws[key] = draw if before is None else before.extended_by(draw)
        if event.kind == "draw":
            state = self.sources[key.source]
            state.drawn.append(draw.rows)
            state.tally.draws += before is None
            state.tally.drawn += len(draw.rows)

    def _remove(self, event: Event) -> None:
        rows = _given(event.rows)
        if event.source is None:
            self.lost += len(rows)
            self.lost_rows.append(rows)
            return
        state = self.sources[event.source]
        state.removed.append(rows)
        state.tally.removed[_given(event.reason)] += len(rows)
        if event.ids is not None:
            self.removed_ids.append((rows, event.ids))


def release(draws: dict[DrawKey, LoggedDraw], stage: str, step: int) -> dict[DrawKey, LoggedDraw]:
    """The draws that may still be repeated after a checkpoint of `stage` that `step` steps went into.

    It covers the stage's draws before, and all of other stages: stages follow one another, so none of those goes on.
    """
    return {key: draw for key, draw in draws.items() if key.stage == stage and key.step >= step}


def _given(value: _T | None) -> _T:
    assert value is not None, "the checksum holds, so the record is as this program wrote it"
    return value
