"""Checks of one shard: each looks at all rows and events at once, and names the trajectories that break a rule."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from buffer.reading.shard_history import REASONS, LoggedState, ShardHistory, given
from buffer.store.counters import Tally
from buffer.trajectory.schema import SOURCES
from buffer.trajectory.staleness import NO_VERSION

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DrawLimits:
    """Limits of a run on its draws, None = none (see `buffer.settings.BufferSettings`)."""

    max_times_sampled: int | None
    max_staleness: int | None


@dataclass(frozen=True)
class Finding:
    """Something that must not be. shard: None where it concerns several; what: in words; names: ids of the trajectories
    concerned, `row N` where nobody knows the id of a row."""

    shard: int | None
    what: str
    names: tuple[str, ...]


class _Findings:
    """Collects the findings of one shard."""

    def __init__(self, shard: int, history: ShardHistory) -> None:
        self._shard = shard
        self._history = history
        self.found: list[Finding] = []

    def add(self, rows: Int64, what: str) -> None:
        """Each of these rows breaks the rule; nothing is noted where there is none."""
        if len(rows):
            self.found.append(Finding(self._shard, what, self._history.names(np.unique(rows))))

    def add_by_value(self, rows: Int64, values: Int64, what: str) -> None:
        """Rows grouped by a number that the words hold in the place of `{}`."""
        for value in np.unique(values).tolist():
            self.add(rows[values == value], what.format(value))

    def note(self, what: str) -> None:
        """What concerns no row in particular."""
        self.found.append(Finding(self._shard, what, ()))


def check_rows(shard: int, history: ShardHistory) -> list[Finding]:
    """Every row that was live when the log began, or was inserted since, is live or was removed once."""
    findings = _Findings(shard, history)
    begin = history.states[0]
    was_live = _live_rows(begin)
    removed, counts = np.unique(history.removed.rows, return_counts=True)
    findings.add_by_value(removed[counts > 1], counts[counts > 1], "removed {} times")
    findings.add(removed[(removed < begin.next_row) & ~np.isin(removed, was_live)], "removed, but not live any longer")
    is_accounted = np.zeros(history.next_row - begin.next_row, dtype=np.bool_)
    for known in (history.stored.rows, removed):
        is_accounted[known[known >= begin.next_row] - begin.next_row] = True
    missing = begin.next_row + np.flatnonzero(~is_accounted)
    old_missing = was_live[(history.stored.find(was_live) < 0) & ~np.isin(was_live, removed)]
    findings.add(np.concatenate([old_missing, missing]), "in no segment, though neither evicted nor dropped")
    return findings.found


def check_draws(shard: int, history: ShardHistory, limits: DrawLimits) -> list[Finding]:
    """Rows were live when they were drawn, of the source and the stage asked for, fresh, and not drawn too often."""
    findings = _Findings(shard, history)
    _check_life(findings, history)
    _check_origin(findings, history, limits)
    drawn, begin = history.drawn, history.states[0]
    pairs, times = np.unique(np.stack([drawn.events, drawn.rows]), axis=1, return_counts=True)
    findings.add(pairs[1, times > 1], "given twice in one draw")
    if limits.max_times_sampled is not None:
        before = [np.repeat(given(each.rows), given(each.times_sampled)) for each in begin.sources.values()]
        rows, times = np.unique(np.concatenate([drawn.rows, *before]), return_counts=True)
        often = times > limits.max_times_sampled
        what = f"drawn {{}} times; max_times_sampled is {limits.max_times_sampled}"
        findings.add_by_value(rows[often], times[often], what)
    return findings.found


def check_states(shard: int, history: ShardHistory) -> list[Finding]:
    """Every file of the log begins with the state that the events before it add up to."""
    findings = _Findings(shard, history)
    for number, state in enumerate(history.states[1:], start=2):
        where = f"state at the begin of file {number} of the log"
        for index, source in enumerate(SOURCES):
            rows, times = _expected_rows(history, state, index)
            logged = given(state.sources[source].rows)
            findings.add(np.setdiff1d(rows, logged), f"live, but missing in the {where}")
            findings.add(np.setdiff1d(logged, rows), f"not live, but listed in the {where}")
            if np.array_equal(rows, logged):
                off = times != given(state.sources[source].times_sampled)
                findings.add(rows[off], f"draws counted wrongly in the {where}")
            counted = Tally.from_counters(state.counters(source))
            for name, expected in _expected_counters(history, state, index).items():
                found = counted.drawn if name == "drawn" else counted.removed[name]
                if found != expected:
                    findings.note(f"{source}: {found} {name} by the {where}, but {expected} by the events before it")
    return findings.found


# What the rest of the log makes one expect


def _check_life(findings: _Findings, history: ShardHistory) -> None:
    drawn, begin = history.drawn, history.states[0]
    dead = (drawn.rows < begin.next_row) & ~np.isin(drawn.rows, _live_rows(begin))
    removed, first = np.unique(history.removed.rows, return_index=True)
    places = np.minimum(np.searchsorted(removed, drawn.rows), max(len(removed) - 1, 0))
    if len(removed):
        dead |= (removed[places] == drawn.rows) & (history.removed.events[first[places]] < drawn.events)
    findings.add(drawn.rows[dead], "drawn after it ceased to be live")


def _check_origin(findings: _Findings, history: ShardHistory, limits: DrawLimits) -> None:
    """Source and versions of drawn rows, as far as their bytes are still there."""
    places = history.stored.find(history.drawn.rows)
    known = places >= 0
    rows, events, places = history.drawn.rows[known], history.drawn.events[known], places[known]
    wrong_source = history.stored.sources[places] != history.drawn.sources[known]
    findings.add(rows[wrong_source], "drawn as a trajectory of the other source")
    oldest = history.stored.oldest[places].astype(np.int64)
    by_policy = oldest != NO_VERSION
    rows, events, oldest = rows[by_policy], events[by_policy], oldest[by_policy]
    findings.add(rows[oldest < _first_versions(history)[events]], "drawn in a later stage than it was made for")
    if limits.max_staleness is None:
        return
    behind = history.log.column("policy_version").fill_null(NO_VERSION).to_numpy()[events] - oldest
    stale = behind > limits.max_staleness
    what = f"drawn with a staleness of {{}}; max_staleness is {limits.max_staleness}"
    findings.add_by_value(rows[stale], behind[stale], what)


def _first_versions(history: ShardHistory) -> Int64:
    """[events] oldest version that counts at each event, by the stage of training."""
    versions = np.full(history.log.num_rows, given(history.states[0].counters().first_version))
    begun = pc.equal(history.log.column("event"), "stage").to_numpy()
    for event in np.flatnonzero(begun).tolist():
        versions[event:] = history.log.column("policy_version")[event].as_py()
    return versions


def _live_rows(state: LoggedState) -> Int64:
    return np.concatenate([given(each.rows) for each in state.sources.values()])


def _expected_rows(history: ShardHistory, state: LoggedState, index: int) -> tuple[Int64, Int64]:
    """Live rows of a source at the begin of a file, and how often each was drawn, by all that the log says before."""
    begin = history.states[0].sources[SOURCES[index]]
    own = history.rows_of_source(index)
    since = own[(own >= history.states[0].next_row) & (own < state.next_row)]
    removed = history.removed.rows[: history.removed.num_before(state.event)]
    rows = np.setdiff1d(np.union1d(given(begin.rows), since), removed)
    before = np.repeat(given(begin.rows), given(begin.times_sampled))
    drawn = np.concatenate([before, history.drawn.rows[: history.drawn.num_before(state.event)]])
    counted, times = np.unique(drawn, return_counts=True)
    places = np.minimum(np.searchsorted(counted, rows), max(len(counted) - 1, 0))
    if not len(counted):
        return rows, np.zeros(len(rows), dtype=np.int64)
    return rows, np.where(counted[places] == rows, times[places], 0)


def _expected_counters(history: ShardHistory, state: LoggedState, index: int) -> dict[str, int]:
    """What the counters of a source at the begin of a file should be: removals by reason, and drawn rows."""
    source = SOURCES[index]
    begin = Tally.from_counters(history.states[0].counters(source))
    removed, drawn = history.removed, history.drawn
    end = removed.num_before(state.event)
    counts = np.bincount(history.reasons[:end][removed.sources[:end] == index], minlength=len(REASONS))
    num_drawn = np.count_nonzero(drawn.sources[: drawn.num_before(state.event)] == index)
    by_reason = {reason: begin.removed[reason] + int(count) for reason, count in zip(REASONS, counts, strict=True)}
    return {**by_reason, "drawn": begin.drawn + int(num_drawn)}
