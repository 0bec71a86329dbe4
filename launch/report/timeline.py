"""What the log of a run says over time: its state, pushes of weights, throughput of each actor."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ValidationError

from launch.monitoring.run_log import LOG_FILE
from launch.report.formatting import duration
from launch.report.plots import MAX_POINTS, Plot, Series

MIN_STRETCH_S = 2.0
"""The driver reads an actor's counter a few times a second: over shorter stretches a rate would be that of reading."""
MAX_ACTORS = 12
"""Actors that are drawn; more lines cannot be told apart."""

RunState = Literal["finished", "stopped", "failed", "open"]
"""`open`: under way, or killed before it could write anything."""
_STATES: dict[str, RunState] = {
    "run_started": "open",
    "run_finished": "finished",
    "run_stopped": "stopped",
    "run_failed": "failed",
}


class LogLine(BaseModel):
    """A line of the log. time: seconds since 1970. actions: of an actor's lines. cause: of a failure."""

    time: float
    level: str
    role: str
    index: int
    event: str
    stage: str | None
    step: int | None
    version: int | None
    message: str
    actions: int | None = None
    cause: str = ""


@dataclass
class Push:
    """One version of the weights, with seconds since the run began. published_s: when the driver saw it, None where it
    saw only newer ones. loaded_s: when it saw each actor with it, by the actor's index.
    """

    version: int
    stage: str | None = None
    step: int | None = None
    published_s: float | None = None
    loaded_s: dict[int, float] = field(default_factory=dict)

    def lag(self, actor: int) -> str:
        """When an actor had the weights; a dash where it never had them."""
        at = self.loaded_s.get(actor)
        if at is None:
            return "\N{EN DASH}"
        return f"at {duration(at)}" if self.published_s is None else f"+{duration(max(0.0, at - self.published_s))}"


@dataclass(frozen=True)
class Progress:
    """The actions that one actor sampled. times_s: [n] since the run began, at least `MIN_STRETCH_S` apart.

    actions: [n] sampled until then by all its processes.
    """

    times_s: list[float]
    actions: list[int]


@dataclass(frozen=True)
class Timeline:
    """last_s: time of the newest line; cause: why the run failed; progress: by the actor's index."""

    began_at: float
    last_s: float
    state: RunState
    cause: str
    pushes: list[Push]
    progress: dict[int, Progress]
    warnings: list[tuple[float, str, str]]

    @property
    def actors(self) -> list[int]:
        """Every actor that loaded weights or counted actions, by its index."""
        return sorted({actor for push in self.pushes for actor in push.loaded_s} | self.progress.keys())


def read_timeline(run: Path) -> Timeline | None:
    """The timeline of a run; None where it has no log yet.

    Raises:
        OSError: the log cannot be read.
    """
    lines = list(_read_lines(run / LOG_FILE))
    if not lines:
        return None
    began_at = lines[0].time
    newest = next((line for line in reversed(lines) if line.event in _STATES), None)
    return Timeline(
        began_at=began_at,
        last_s=lines[-1].time - began_at,
        state="open" if newest is None else _STATES[newest.event],
        cause="" if newest is None else newest.cause,
        pushes=_pushes(lines),
        progress=_progress(lines),
        warnings=[
            (line.time - began_at, line.role, line.message) for line in lines if line.level in ("warning", "error")
        ],
    )


def timeline_plots(timeline: Timeline) -> list[Plot]:
    """The versions of learner and actors, and the actions per second of each actor, as far as there are any."""
    shown = timeline.actors[:MAX_ACTORS]
    left_out = len(timeline.actors) - len(shown)
    note = f" Drawn are the first {MAX_ACTORS} of {len(timeline.actors):,} actors." if left_out else ""
    # Stages without rollouts may come before the second version, for as long as they like.
    pushes = timeline.pushes[1:] or timeline.pushes
    versions = [("learner", [(push.published_s, push.version) for push in pushes if push.published_s is not None])]
    versions += [
        (f"actor {actor}", [(push.loaded_s[actor], push.version) for push in pushes if actor in push.loaded_s])
        for actor in shown
    ]
    stairs = []
    for color, (name, points) in enumerate(versions):
        if points:  # else an actor that loaded the first version only
            kept = [points[index] for index in _thinned(len(points))]
            edges = [*(at for at, _ in kept), max(timeline.last_s, kept[-1][0])]
            stairs.append(Series(name, edges, [version for _, version in kept], color=color))
    rates = []
    for actor in shown:
        progress = timeline.progress.get(actor)
        if progress is not None and len(progress.times_s) > 1:
            chosen = [*_thinned(len(progress.times_s) - 1), len(progress.times_s) - 1]
            times, actions = np.array(progress.times_s)[chosen], np.array(progress.actions)[chosen]
            per_s = np.diff(actions) / np.diff(times)
            rates.append(Series(f"actor {actor}", times.tolist(), per_s.tolist(), color=actor + 1))
    caption = (
        "Actions that each actor sampled per second, between two moments at which the driver read its counter; pauses "
        "and waits are included."
    )
    plots = [
        Plot("Weights over time", "version", _push_caption(timeline) + note, "s", tuple(stairs), "stairs"),
        Plot("Actions per actor", "actions/s", caption + note, "s", tuple(rates), "stairs"),
    ]
    return [plot for plot in plots if plot.series]


def _push_caption(timeline: Timeline) -> str:
    """How long weights took from the learner to the actors, apart from the first weights of each actor."""
    first: dict[int, int] = {}
    for push in timeline.pushes:
        for actor in push.loaded_s:
            first.setdefault(actor, push.version)
    lags = [
        max(0.0, loaded_s - push.published_s)
        for push in timeline.pushes
        for actor, loaded_s in push.loaded_s.items()
        if push.published_s is not None and push.version > first[actor]
    ]
    text = f"{len(timeline.pushes):,} versions, as the driver saw them, a few times a second; drawn from the second on."
    if not lags:
        return text
    median, longest = duration(statistics.median(lags)), duration(max(lags))
    return f"{text} From the learner's push until an actor had the weights: {median} (median), {longest} at most."


def _read_lines(path: Path) -> Iterator[LogLine]:
    """A line that a crash tore is left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield LogLine.model_validate_json(line)
            except ValidationError:
                continue


def _pushes(lines: Sequence[LogLine]) -> list[Push]:
    pushes: dict[int, Push] = {}
    for line in lines:
        if line.version is not None and line.event in ("weights_published", "weights_loaded"):
            push, at = pushes.setdefault(line.version, Push(line.version)), line.time - lines[0].time
            if line.event == "weights_loaded":
                push.loaded_s.setdefault(line.index, at)
            else:
                push.stage, push.step, push.published_s = line.stage, line.step, at
    return [pushes[version] for version in sorted(pushes)]


def _progress(lines: Sequence[LogLine]) -> dict[int, Progress]:
    found: dict[int, Progress] = {}
    newest: dict[int, int] = {}
    for line in lines:
        if line.role != "actor" or line.actions is None:
            continue
        at, progress = line.time - lines[0].time, found.setdefault(line.index, Progress([], []))
        if progress.times_s and at - progress.times_s[-1] < MIN_STRETCH_S:
            continue
        before = newest.get(line.index, line.actions)
        # A counter that fell belongs to a new process.
        grown = line.actions - before if line.actions >= before else line.actions
        newest[line.index] = line.actions
        progress.times_s.append(at)
        progress.actions.append((progress.actions or [0])[-1] + grown)
    return dict(sorted(found.items()))


def _thinned(count: int) -> list[int]:
    """Indices of at most `MAX_POINTS` of `count` points, ascending, with the first one."""
    return [index * count // min(count, MAX_POINTS) for index in range(min(count, MAX_POINTS))]
