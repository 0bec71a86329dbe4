"""What the log of a run tells over time: its state, pushes of weights, throughput of each actor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from launch.monitoring.run_log import LOG_FILE

MIN_STRETCH_S = 2.0
"""Actors tell their counters a few times a second: over shorter stretches a rate would be that of the telling."""

RunState = Literal["finished", "stopped", "failed", "open"]
"""`open`: under way, or killed before it could say anything."""


class LogLine(BaseModel):
    """A line of the log. time: seconds since 1970. actions: of an actor's lines. cause: of a failure."""

    time: float
    level: str
    role: str
    event: str
    index: int
    stage: str | None
    step: int | None
    version: int | None
    message: str
    actions: int | None = None
    cause: str = ""


@dataclass(frozen=True)
class Push:
    """One version of the weights. published_s: when the driver saw it, None where it saw only newer ones; taken_s: when
    it saw each actor with it, by the actor's index. Seconds since the run began.
    """

    version: int
    stage: str | None
    step: int | None
    published_s: float | None
    taken_s: dict[int, float]


@dataclass(frozen=True)
class Rates:
    """Actions per second of one actor, each between two of its lines at least `MIN_STRETCH_S` apart.

    starts_s, ends_s: since the run began.
    """

    actor: int
    starts_s: list[float]
    ends_s: list[float]
    actions_per_s: list[float]


@dataclass(frozen=True)
class Timeline:
    """starts_s: when the run began, and each time it was resumed; last_s: the newest line; ended: what it said last."""

    began_at: float
    starts_s: list[float]
    last_s: float
    state: RunState
    ended: str
    pushes: list[Push]
    rates: list[Rates]
    warnings: list[tuple[float, str, str]]


def read_timeline(run: Path) -> Timeline | None:
    """The timeline of a run; None where it has no log yet.

    Raises:
        OSError: the log cannot be read.
    """
    lines = list(_read_lines(run / LOG_FILE))
    if not lines:
        return None
    began_at = lines[0].time
    own = [line for line in lines if line.role == "driver"]
    state, ended = _state(own)
    return Timeline(
        began_at=began_at,
        starts_s=[line.time - began_at for line in own if line.event == "run_started"],
        last_s=lines[-1].time - began_at,
        state=state,
        ended=ended,
        pushes=_pushes(lines, began_at),
        rates=_rates(lines, began_at),
        warnings=[
            (line.time - began_at, line.role, line.message) for line in lines if line.level in ("warning", "error")
        ],
    )


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


def _state(own: Sequence[LogLine]) -> tuple[RunState, str]:
    for line in reversed(own):
        if line.event == "run_started":
            break
        if line.event == "run_finished":
            return "finished", ""
        if line.event == "run_stopped":
            return "stopped", ""
        if line.event == "run_failed":
            return "failed", line.cause
    return "open", ""


def _pushes(lines: Iterable[LogLine], began_at: float) -> list[Push]:
    published: dict[int, LogLine] = {}
    taken: dict[int, dict[int, float]] = defaultdict(dict)
    for line in lines:
        if line.version is None:
            continue
        if line.event == "weights_published":
            published[line.version] = line
        elif line.event == "weights_loaded":
            taken[line.version].setdefault(line.index, line.time - began_at)
    pushes = []
    for version in sorted(published.keys() | taken.keys()):
        line_ = published.get(version)
        pushes.append(
            Push(
                version,
                line_.stage if line_ else None,
                line_.step if line_ else None,
                line_.time - began_at if line_ else None,
                dict(sorted(taken[version].items())),
            )
        )
    return pushes


def _rates(lines: Iterable[LogLine], began_at: float) -> list[Rates]:
    newest: dict[int, LogLine] = {}
    rates: dict[int, Rates] = {}
    for line in lines:
        if line.role != "actor" or line.actions is None:
            continue
        before = newest.setdefault(line.index, line)
        assert before.actions is not None, "lines without a counter are left out above"
        if line.time - before.time < MIN_STRETCH_S:
            continue
        newest[line.index] = line
        # A counter that fell is that of a new process.
        actions = line.actions - before.actions if line.actions >= before.actions else line.actions
        found = rates.setdefault(line.index, Rates(line.index, [], [], []))
        found.starts_s.append(before.time - began_at)
        found.ends_s.append(line.time - began_at)
        found.actions_per_s.append(actions / (line.time - before.time))
    return [rates[index] for index in sorted(rates)]
