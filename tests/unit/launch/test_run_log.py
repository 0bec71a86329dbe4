"""The log of a run: every line says who, with which weights, at which step; what happened stands there once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from actors.pool.controller import MemberStatus, PoolEvent, PoolEventKind, PoolStatus
from actors.rollout_actor import ActorStatus
from buffer.service.shard import BufferStatus
from launch.errors import RunFailedError
from launch.monitoring.live_view import RunView
from launch.monitoring.run_log import LOG_FILE, RunEvent, RunLog
from learner.messages import LearnerStatus

LEARNER = LearnerStatus("sequencematch", 100, 400, 0.1, 11, "training", {"loss": 0.5})
STARTING = PoolEvent(0, "actor_starting", "actor-3", "actor-3 starting")
WORKING = ActorStatus("actor-3", 10, 20_000, 4213.0, 2_000, 5_000, 0, 64, "generating")


def pool(*members: MemberStatus, events: tuple[PoolEvent, ...] = ()) -> PoolStatus:
    return PoolStatus(len(members), 11, members, events)


def lines_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()]


def told(folder: Path) -> list[tuple[object, ...]]:
    return [(line["level"], line["role"], line["index"], line["version"], line["event"]) for line in lines_of(folder)]


def test_every_line_says_run_role_index_stage_step_and_version(tmp_path: Path) -> None:
    view = RunView(tmp_path.name, [], learner=LEARNER)
    view.pool = pool(MemberStatus("actor-3", "running", 0, WORKING), events=(STARTING,))
    view.buffer = BufferStatus((None,))
    with RunLog(tmp_path) as log:
        log.write("info", "driver", "run_started", "the run begins")
        log.follow(view)
        log.follow(view)
    assert told(tmp_path) == [
        ("info", "driver", 0, None, "run_started"),
        ("info", "learner", 0, 11, "stage_started"),
        ("info", "learner", 0, 11, "weights_published"),
        ("info", "pool", 0, 11, "actor_starting"),
        ("info", "actor", 3, 10, "actor_state"),
        ("info", "actor", 3, 10, "weights_loaded"),
        ("warning", "buffer", 0, 11, "shard_silent"),
    ]
    lines = lines_of(tmp_path)
    keys = {"time", "level", "run", "role", "index", "event", "stage", "step", "version", "message"}
    assert all(keys <= line.keys() and line["run"] == tmp_path.name for line in lines)
    assert [line["step"] for line in lines] == [None, *[100] * 6]
    assert [line.get("actions") for line in lines] == [None] * 4 + [20_000] * 2 + [None]
    assert (lines[3]["actor"], lines[4]["state"]) == ("actor-3", "running")


def test_changes_are_told_once_as_they_come(tmp_path: Path) -> None:
    newborn = MemberStatus("actor-0", "starting", 0, None)
    waiting = replace(WORKING, name="actor-0", policy_version=-1)
    with RunLog(tmp_path) as log:
        view = RunView(tmp_path.name, [], learner=replace(LEARNER, policy_version=-1))
        for member in (newborn, *[MemberStatus("actor-0", "running", 0, waiting)] * 2):
            view.pool = pool(member)
            log.follow(view)
        view.learner = replace(LEARNER, step=110, warnings=("backspaces take over",), notes=("fitted",))
        view.pool = pool(MemberStatus("actor-0", "running", 0, replace(waiting, policy_version=11)))
        log.follow(view)
        view.pool = pool(events=(PoolEvent(7, "actor_failed", "actor-0", "actor-0 failed: OSError: no space"),))
        log.follow(view)
        log.follow(view)
    assert told(tmp_path)[1:] == [
        ("info", "actor", 0, None, "actor_state"),
        ("info", "actor", 0, None, "actor_state"),
        ("info", "actor", 0, None, "weights_awaited"),
        ("info", "learner", 0, 11, "weights_published"),
        ("info", "learner", 0, 11, "learner_note"),
        ("warning", "learner", 0, 11, "learner_warning"),
        ("info", "actor", 0, 11, "weights_loaded"),
        ("warning", "pool", 0, 11, "actor_failed"),
        ("info", "actor", 0, 11, "actor_gone"),
    ]


def test_what_an_actor_says_is_told_when_it_changes(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        view = RunView(tmp_path.name, [])
        for dropped, reason in ((0, None), (2, "reward is nan"), (5, "reward is nan"), (6, "reward raised E: x")):
            status = replace(WORKING, dropped=dropped, drop_reason=reason, weights_note=reason and "noise of 0.01 nats")
            view.pool = pool(MemberStatus("actor-3", "running", 0, status))
            log.follow(view)
    lines = lines_of(tmp_path)[2:]
    assert [line["message"] for line in lines if line["event"] == "weights_verified"] == ["noise of 0.01 nats"]
    dropped = [line for line in lines if line["event"] != "weights_verified"]
    assert {(line["level"], line["event"]) for line in dropped} == {("warning", "rollouts_dropped")}
    assert [(line["dropped"], line["reason"]) for line in dropped] == [(2, "reward is nan"), (6, "reward raised E: x")]


def test_a_resumed_run_goes_on_behind_a_torn_line_and_says_how_it_ended(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / LOG_FILE).write_text('{"time": 1.0, "mess')
    with pytest.raises(RuntimeError), RunLog(tmp_path) as log:  # noqa: PT012
        log.write("info", "driver", "run_started", "the run begins")
        raise RuntimeError("no more\nthan this")
    torn, *whole = (tmp_path / LOG_FILE).read_text().splitlines()
    assert torn == '{"time": 1.0, "mess'
    begun, ended = map(json.loads, whole)
    assert (begun["event"], ended["event"]) == ("run_started", "run_failed")
    assert ended["cause"] == "RuntimeError: no more\nthan this"


def test_a_full_disk_ends_the_run_and_hinders_nothing_on_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / LOG_FILE).symlink_to("/dev/full")
    with RunLog(tmp_path) as log:
        log.write("info", "driver", "run_started", "the run begins")
        with pytest.raises(RunFailedError, match=r"run\.jsonl cannot be written: .*No space left.*; free space there"):
            log.follow(RunView(tmp_path.name, [], learner=LEARNER))
        log.write("warning", "driver", "process_warning", "a shard did not end by itself")


def test_events_of_a_pool_are_told_once_when_the_oldest_have_fallen_out(tmp_path: Path) -> None:
    events = [PoolEvent(number, "pool_scaled", "", "scale 1 -> 2") for number in range(4)]
    with RunLog(tmp_path) as log:
        for seen in (events[:2], events[1:3], events[1:3], events[2:]):
            log.follow(RunView(tmp_path.name, [], pool=pool(events=tuple(seen))))
    assert [line["event"] for line in lines_of(tmp_path)] == ["pool_scaled"] * 4


def test_the_docs_name_every_event() -> None:
    docs = (Path(__file__).parents[3] / "docs" / "monitoring.md").read_text(encoding="utf-8")
    assert [event for event in (*get_args(RunEvent), *get_args(PoolEventKind)) if f"`{event}`" not in docs] == []
