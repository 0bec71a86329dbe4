"""What happened in a run, as JSON lines in RUN/logs/run.jsonl: each with run, role, index, event, version and step.

Programs decide by `event` and the fields beside it; `message` is the sentence for people.

The driver writes the log, because it hears of everything, also where the run's processes share no file system with it.
Ray's JSON logging (`ray.LoggingConfig`) knows jobs and processes, not versions and steps, and writes into the driver's
terminal, where the live display is. What processes print stays in Ray's session folder.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Literal, NamedTuple

from actors.status import MemberStatus, PoolEventKind, PoolStatus
from buffer.service.status import BufferStatus, ShardStatus
from launch.errors import RunFailedError
from launch.monitoring.live_view import RunView
from learner.messages import LearnerStatus

LOG_FILE = "logs/run.jsonl"

Level = Literal["info", "warning", "error"]
Role = Literal["driver", "learner", "pool", "actor", "buffer"]
Value = str | int | float | None
RunEvent = Literal[
    "run_started",
    "run_finished",
    "run_stopped",
    "run_failed",
    "setting_changed",
    "processes_placed",
    "room_awaited",
    "autoscaled",
    "process_warning",
    "stage_started",
    "weights_published",
    "learner_note",
    "learner_warning",
    "actor_state",
    "actor_gone",
    "weights_awaited",
    "weights_loaded",
    "weights_verified",
    "rollouts_dropped",
    "shard_silent",
    "shard_damaged",
    "shard_serving",
]
Event = RunEvent | PoolEventKind


class _Fact(NamedTuple):
    """What is told of a process once for each new `key`."""

    key: Value
    level: Level
    message: str
    values: dict[str, Value]


class RunLog:
    """Appends to the log of a run: what it is told, and what changed from one view of the run to the next."""

    def __init__(self, folder: Path) -> None:
        """folder: of the run; its name is the run's."""
        self._run = folder.name
        self._path = folder / LOG_FILE
        self._path.parent.mkdir(exist_ok=True)
        self._refusal: OSError | None = None
        torn = _is_torn(self._path)
        self._file = self._path.open("ab", buffering=0)  # a reader follows the lines as they come
        if torn:  # by the death of an earlier driver, or by a full disk
            self._append("\n")
        self._learner: LearnerStatus | None = None
        self._members: dict[str, MemberStatus] = {}
        self._newest_event = -1
        self._shards: dict[int, dict[Event, _Fact]] = {}

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            cause = f"{type(error).__name__}: {error}"
            self.write("error", "driver", "run_failed", f"the run ended: {cause}", {"cause": cause})
        self._file.close()

    def write(
        self,
        level: Level,
        role: Role,
        event: Event,
        message: str,
        values: Mapping[str, Value] = MappingProxyType({}),
        *,
        index: int = 0,
        version: int | None = None,
    ) -> None:
        """One line. values: fields of the event. index: number of the process among those of its role. version: of an
        actor's weights, None before its first ones; the lines of all others have the newest published version.

        A refusal of the disk is raised by the next `follow`, so that it never hinders a run that is ending.
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
            "version": version if role == "actor" else published,
            **values,
            "message": message,
        }
        self._append(json.dumps(line, ensure_ascii=False) + "\n")

    def follow(self, view: RunView) -> None:
        """Write down what is new in the view.

        Raises:
            RunFailedError: the disk has refused a line.
        """
        if view.learner is not None:
            self._follow_learner(view.learner)
        if view.pool is not None:
            self._follow_pool(view.pool)
        if view.buffer is not None:
            self._follow_buffer(view.buffer)
        if self._refusal is not None:
            raise RunFailedError(f"{self._path} cannot be written: {self._refusal}; make room or give permission there")

    def _append(self, line: str) -> None:
        """Write a line whole, or its beginning and nothing after it."""
        if self._refusal is not None:
            return
        content = line.encode()
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError as error:
            self._refusal = error

    def _follow_learner(self, learner: LearnerStatus) -> None:
        before, self._learner = self._learner, learner
        if learner.stage and (before is None or before.stage != learner.stage):
            self.write("info", "learner", "stage_started", f"stage {learner.stage} has begun")
        if learner.policy_version >= 0 and (before is None or before.policy_version != learner.policy_version):
            self.write("info", "learner", "weights_published", f"published weights v{learner.policy_version}")
        for note in learner.notes[0 if before is None else len(before.notes) :]:
            self.write("info", "learner", "learner_note", note)
        for warning in learner.warnings[0 if before is None else len(before.warnings) :]:
            self.write("warning", "learner", "learner_warning", warning)

    def _follow_pool(self, pool: PoolStatus) -> None:
        for event in pool.events:
            if event.number > self._newest_event:
                self._newest_event = event.number
                level: Level = "warning" if event.kind == "actor_failed" else "info"
                self.write(level, "pool", event.kind, event.message, {"actor": event.actor})
        members = {member.name: member for member in pool.members}
        for name, member in members.items():
            told = self._members.get(name)
            self._of_actor(member, _new(_actor_facts(told) if told else {}, _actor_facts(member)))
        for name in self._members.keys() - members.keys():
            self._of_actor(self._members[name], {"actor_gone": _Fact("", "info", "gone", {})})
        self._members = members

    def _of_actor(self, member: MemberStatus, facts: dict[Event, _Fact]) -> None:
        index, status = int(member.name.rpartition("-")[2]), member.status
        version = None if status is None or status.policy_version < 0 else status.policy_version
        for event, fact in facts.items():
            values = {"actions": None if status is None else status.actions, **fact.values}
            self.write(fact.level, "actor", event, fact.message, values, index=index, version=version)

    def _follow_buffer(self, buffer: BufferStatus) -> None:
        for index, shard in enumerate(buffer.shards):
            facts = _shard_facts(shard)
            for event, fact in _new(self._shards.get(index, {}), facts).items():
                self.write(fact.level, "buffer", event, fact.message, fact.values, index=index)
            self._shards[index] = facts


def _new(before: dict[Event, _Fact], now: dict[Event, _Fact]) -> dict[Event, _Fact]:
    return {event: fact for event, fact in now.items() if event not in before or before[event].key != fact.key}


def _actor_facts(member: MemberStatus) -> dict[Event, _Fact]:
    facts: dict[Event, _Fact] = {"actor_state": _Fact(member.state, "info", member.state, {"state": member.state})}
    status = member.status
    if status is None:
        return facts
    if status.policy_version < 0:
        facts["weights_awaited"] = _Fact("", "info", "waits for its first weights", {})
    else:
        facts["weights_loaded"] = _Fact(status.policy_version, "info", f"has weights v{status.policy_version}", {})
    if status.drop_reason is not None:
        message = f"dropped {status.dropped} rollouts so far, the last one because {status.drop_reason}"
        values: dict[str, Value] = {"dropped": status.dropped, "reason": status.drop_reason}
        facts["rollouts_dropped"] = _Fact(status.drop_reason, "warning", message, values)
    if status.weights_note is not None:
        facts["weights_verified"] = _Fact(status.weights_note, "info", status.weights_note, {})
    return facts


def _shard_facts(shard: ShardStatus | None) -> dict[Event, _Fact]:
    if shard is None:
        return {"shard_silent": _Fact("", "warning", "does not answer", {})}
    if shard.troubles:
        message = "; ".join(shard.troubles)
        return {"shard_damaged": _Fact(message, "warning", message, {})}
    return {"shard_serving": _Fact(shard.pid, "info", f"serving, process {shard.pid}", {"pid": shard.pid})}


def _is_torn(path: Path) -> bool:
    """Whether the file has a last line without an end."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
