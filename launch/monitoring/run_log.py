"""The events of a run as JSON lines in RUN/logs/run.jsonl: each with run, role, index, event, version and step.

Programs read `event` and its fields; `message` is for people. The driver writes the log, because it polls all
processes, also those that share no file system with it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

from buffer.service.shard import ShardStatus
from launch.errors import RunFailedError
from launch.monitoring.live_view import RunView
from learner.messages import LearnerStatus

if TYPE_CHECKING:  # imports Ray
    from actors.pool.controller import MemberStatus, PoolEventKind, PoolStatus

LOG_FILE = "logs/run.jsonl"

Level = Literal["info", "warning", "error"]
Role = Literal["driver", "learner", "pool", "actor", "buffer"]
Value = str | int | float | None
_RunStateEvent = Literal["run_started", "run_finished", "run_stopped", "run_failed"]
_DriverEvent = Literal["setting_changed", "processes_placed", "capacity_awaited", "autoscaled", "process_warning"]
_AnswersEvent = Literal["questions_answered", "questions_skipped"]
_LearnerEvent = Literal["stage_started", "weights_published", "learner_note", "learner_warning"]
_ActorEvent = Literal["actor_state", "actor_gone", "rollouts_dropped"]
_WeightsEvent = Literal["weights_awaited", "weights_loaded", "weights_verified"]
_ShardEvent = Literal["shard_silent", "shard_damaged", "shard_serving"]
RunEvent = Literal[_RunStateEvent, _DriverEvent, _AnswersEvent, _LearnerEvent, _ActorEvent, _WeightsEvent, _ShardEvent]


class _Event(NamedTuple):
    """An event of a process. It is logged again only when its message changes."""

    event: RunEvent
    message: str
    values: Mapping[str, Value] = MappingProxyType({})
    level: Level = "info"


class RunLog:
    """Appends to the log of a run: events that it is given, and changes from one view of the run to the next."""

    def __init__(self, folder: Path) -> None:
        """folder: the run folder; its name is the name of the run."""
        self._run = folder.name
        self._path = folder / LOG_FILE
        self._path.parent.mkdir(exist_ok=True)
        self._write_error: OSError | None = None
        self._file = self._path.open("a+b", buffering=0)  # unbuffered: others read lines while they are written
        if self._path.is_file() and self._file.tell():
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":  # an earlier driver died, or the disk was full, within a line
                self._append("\n")
        self._learner: LearnerStatus | None = None
        self._members: dict[str, MemberStatus] = {}
        self._newest_event = -1
        self._logged: dict[tuple[Role, int], dict[RunEvent, str]] = {}

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            cause = f"{type(error).__name__}: {error}"
            self.write("error", "driver", "run_failed", f"the run ended: {cause}", {"cause": cause})
        self._file.close()

    def write(
        self,
        level: Level,
        role: Role,
        event: RunEvent | PoolEventKind,
        message: str,
        values: Mapping[str, Value] = MappingProxyType({}),
        index: int = 0,
    ) -> None:
        """Append one line. values: fields of the event; `version` is the newest published one unless they hold another.

        index: number of the process within its role. An error of the disk is raised by the next `follow`, so that it
        cannot interrupt the end of a run.
        """
        learner = self._learner
        published = None if learner is None or learner.policy_version < 0 else learner.policy_version
        line = {
            "time": round(time.time(), 3),
            "level": level,
            "run": self._run,
            "role": role,
            "index": index,
            "event": event,
            "stage": None if learner is None else learner.stage or None,
            "step": None if learner is None else learner.step,
            "version": published,
            **values,
            "message": message,
        }
        self._append(json.dumps(line, ensure_ascii=False) + "\n")

    def follow(self, view: RunView) -> None:
        """Log what changed since the last view; RunFailedError if a line could not be written."""
        if view.learner is not None:
            self._follow_learner(view.learner)
        if view.pool is not None:
            self._follow_pool(view.pool)
        for index, shard in enumerate(view.buffer.shards if view.buffer else ()):
            self._log_changes("buffer", index, _shard_event(shard))
        if self._write_error is not None:
            error = self._write_error
            raise RunFailedError(f"{self._path} cannot be written: {error}; free space there, or allow writing")

    def _append(self, line: str) -> None:
        """Write a line; after an error nothing more is written."""
        if self._write_error is not None:
            return
        content = line.encode()
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError as error:
            self._write_error = error

    def _follow_learner(self, learner: LearnerStatus) -> None:
        before, self._learner = self._learner, learner
        version, events = learner.policy_version, []
        if learner.stage:
            events.append(_Event("stage_started", f"stage {learner.stage} has begun"))
        if version >= 0:
            events.append(_Event("weights_published", f"published weights v{version}"))
        self._log_changes("learner", 0, *events)
        for note in learner.notes[len(before.notes) if before else 0 :]:
            self.write("info", "learner", "learner_note", note)
        for warning in learner.warnings[len(before.warnings) if before else 0 :]:
            self.write("warning", "learner", "learner_warning", warning)

    def _follow_pool(self, pool: PoolStatus) -> None:
        for event in pool.events:
            if event.number > self._newest_event:
                self._newest_event = event.number
                level: Level = "warning" if event.kind == "actor_failed" else "info"
                self.write(level, "pool", event.kind, event.message, {"actor": event.actor})
        members = {member.name: member for member in pool.members}
        for name in self._members.keys() - members.keys():
            self._log_changes("actor", _index(name), _Event("actor_gone", "gone", _counters(self._members[name])))
        for name, member in members.items():
            self._log_changes("actor", _index(name), *_actor_events(member))
        self._members = members

    def _log_changes(self, role: Role, index: int, *events: _Event) -> None:
        """Log the events of a process that are new or have another message."""
        before = self._logged.get((role, index), {})
        for event in events:
            if before.get(event.event) != event.message:
                self.write(event.level, role, event.event, event.message, event.values, index)
        self._logged[role, index] = {event.event: event.message for event in events}


def _index(actor: str) -> int:
    return int(actor.rpartition("-")[2])


def _counters(member: MemberStatus) -> dict[str, Value]:
    """Fields of every line of an actor; `version` is None before its first weights."""
    if member.status is None:
        return {"version": None, "actions": None}
    version = member.status.policy_version
    return {"version": None if version < 0 else version, "actions": member.status.actions}


def _actor_events(member: MemberStatus) -> Iterator[_Event]:
    status, counters = member.status, _counters(member)
    yield _Event("actor_state", member.state, {**counters, "state": member.state})
    if status is None:
        return
    if status.policy_version < 0:
        yield _Event("weights_awaited", "waits for its first weights", counters)
    else:
        yield _Event("weights_loaded", f"has weights v{status.policy_version}", counters)
    if (reason := status.drop_reason) is not None:
        values: dict[str, Value] = {**counters, "dropped": status.dropped, "reason": reason}
        yield _Event("rollouts_dropped", f"drops rollouts, the last one because {reason}", values, "warning")
    if (note := status.weights_note) is not None:
        yield _Event("weights_verified", note, counters)


def _shard_event(shard: ShardStatus | None) -> _Event:
    if shard is None:
        return _Event("shard_silent", "does not answer", level="warning")
    if shard.troubles:
        return _Event("shard_damaged", "; ".join(shard.troubles), level="warning")
    return _Event("shard_serving", f"serving, process {shard.pid}", {"pid": shard.pid})
