"""What happened in a run, as JSON lines in RUN/logs/run.jsonl: each with run, role, index, version and step.

Written by the driver, which hears of everything, also where the run's processes share no file system with it. Ray's
JSON logging (`ray.LoggingConfig`) knows jobs and processes, not versions and steps, and writes into the driver's
terminal, where the live display is. What processes print stays in Ray's session folder.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

from actors.status import MemberStatus, PoolStatus
from buffer.service.status import BufferStatus
from launch.errors import RunFailedError
from launch.monitoring.live_view import RunView
from learner.status import LearnerStatus

LOG_FILE = "logs/run.jsonl"

# Messages that `launch.report` reads again, whole or as beginnings.
RUN_BEGINS = "the run begins"
RUN_FINISHED = "the run is finished"
RUN_STOPPED = "the run was stopped"
RUN_ENDED = "the run ended: "
PUBLISHED = "published weights v"
HAS_WEIGHTS = "has weights v"

Level = Literal["info", "warning", "error"]
Role = Literal["driver", "learner", "pool", "actor", "buffer"]


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
        self._events: tuple[str, ...] = ()
        self._shards: dict[int, str] = {}

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.write("error", "driver", f"{RUN_ENDED}{type(error).__name__}: {error}")
        self._file.close()

    def write(
        self,
        level: Level,
        role: Role,
        message: str,
        *,
        index: int = 0,
        version: int | None = None,
        actions: int | None = None,
    ) -> None:
        """One line. index: number of the process among those of its role; version: of an actor's weights, None before
        its first ones; the lines of all others have the newest published version. actions: that an actor has sampled
        since its birth.

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
            "stage": None if learner is None else learner.stage or None,
            "step": None if learner is None else learner.step,
            "version": version if role == "actor" else published,
            "actions": actions,
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
            self.write("info", "learner", f"stage {learner.stage} has begun")
        if learner.policy_version >= 0 and (before is None or before.policy_version != learner.policy_version):
            self.write("info", "learner", f"{PUBLISHED}{learner.policy_version}")
        for note in learner.notes[0 if before is None else len(before.notes) :]:
            self.write("info", "learner", note)
        for warning in learner.warnings[0 if before is None else len(before.warnings) :]:
            self.write("warning", "learner", warning)

    def _follow_pool(self, pool: PoolStatus) -> None:
        for event in news(self._events, pool.events):
            self.write("warning" if " failed: " in event else "info", "pool", event)
        self._events = pool.events
        members = {member.name: member for member in pool.members}
        for name, member in members.items():
            before = self._members.get(name)
            if before is None or before.state != member.state:
                self._of_actor(member, member.state)
            version = None if member.status is None else member.status.policy_version
            if version is not None and (
                before is None or before.status is None or before.status.policy_version != version
            ):
                self._of_actor(member, f"{HAS_WEIGHTS}{version}" if version >= 0 else "waits for its first weights")
            dropped = _drop_reason_of(member)
            if member.status is not None and dropped is not None and dropped != _drop_reason_of(before):
                message = f"dropped {member.status.dropped} rollouts so far, the last one because {dropped}"
                self._of_actor(member, message, level="warning")
            if (note := _weights_note_of(member)) is not None and note != _weights_note_of(before):
                self._of_actor(member, note)
        for name in self._members.keys() - members.keys():
            self._of_actor(self._members[name], "gone")
        self._members = members

    def _of_actor(self, member: MemberStatus, message: str, level: Level = "info") -> None:
        self.write(
            level,
            "actor",
            message,
            index=int(member.name.rpartition("-")[2]),
            version=_version_of(member),
            actions=None if member.status is None else member.status.actions,
        )

    def _follow_buffer(self, buffer: BufferStatus) -> None:
        for index, shard in enumerate(buffer.shards):
            state = "does not answer" if shard is None else "; ".join(shard.troubles) or f"serving, process {shard.pid}"
            if self._shards.get(index) == state:
                continue
            self._shards[index] = state
            troubled = shard is None or bool(shard.troubles)
            self.write("warning" if troubled else "info", "buffer", state, index=index)


def news(before: Sequence[str], now: Sequence[str]) -> Sequence[str]:
    """The events at the end of `now` that were not there before; old ones may have fallen out at its beginning."""
    for fallen in range(len(before) + 1):
        kept = len(before) - fallen
        if list(now[:kept]) == list(before[fallen:]):
            return now[kept:]
    raise AssertionError("the loop ends with kept == 0, where both are empty")


def _is_torn(path: Path) -> bool:
    """Whether the file has a last line without an end."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _drop_reason_of(member: MemberStatus | None) -> str | None:
    """Of the last rollout that it dropped; None where it dropped none, or has not answered yet."""
    return None if member is None or member.status is None else member.status.drop_reason


def _weights_note_of(member: MemberStatus | None) -> str | None:
    """How its newest weights were proven, where it says anything of it."""
    return None if member is None or member.status is None else member.status.weights_note


def _version_of(member: MemberStatus) -> int | None:
    """Of its weights; None where it has none, or has not answered yet."""
    status = member.status
    return None if status is None or status.policy_version < 0 else status.policy_version
