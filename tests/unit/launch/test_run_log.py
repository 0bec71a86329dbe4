"""The log of a run: every line says who, with which weights, at which step; what happened stands there once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from actors.status import ActorStatus, MemberStatus, PoolStatus
from buffer.service.status import BufferStatus
from launch.errors import RunFailedError
from launch.monitoring.live_view import RunView
from launch.monitoring.run_log import LOG_FILE, RunLog, news
from learner.status import LearnerStatus

LEARNER = LearnerStatus("sequencematch", 100, 400, 0.1, 11, "training", {"loss": 0.5})
WORKING = ActorStatus("actor-3", 10, 20_000, 4213.0, 2_000, 5_000, 0, 64, "generating")


def pool(*members: MemberStatus, events: tuple[str, ...] = ()) -> PoolStatus:
    return PoolStatus(len(members), 11, members, events)


def lines_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()]


def told(folder: Path) -> list[tuple[object, ...]]:
    return [(line["level"], line["role"], line["index"], line["version"], line["message"]) for line in lines_of(folder)]


def test_every_line_says_run_role_index_stage_step_and_version(tmp_path: Path) -> None:
    view = RunView(tmp_path.name, [], learner=LEARNER)
    view.pool = pool(MemberStatus("actor-3", "running", 0, WORKING), events=("12:00:00 actor-3 starting",))
    view.buffer = BufferStatus((None,))
    with RunLog(tmp_path) as log:
        log.write("info", "driver", "the run begins")
        log.follow(view)
        log.follow(view)
    assert told(tmp_path) == [
        ("info", "driver", 0, None, "the run begins"),
        ("info", "learner", 0, 11, "stage sequencematch has begun"),
        ("info", "learner", 0, 11, "published weights v11"),
        ("info", "pool", 0, 11, "12:00:00 actor-3 starting"),
        ("info", "actor", 3, 10, "running"),
        ("info", "actor", 3, 10, "has weights v10"),
        ("warning", "buffer", 0, 11, "does not answer"),
    ]
    keys = {"time", "level", "run", "role", "index", "stage", "step", "version", "actions", "message"}
    assert all(line.keys() == keys and line["run"] == tmp_path.name for line in lines_of(tmp_path))
    assert [line["step"] for line in lines_of(tmp_path)] == [None, *[100] * 6]
    assert [line["actions"] for line in lines_of(tmp_path)] == [None] * 4 + [20_000] * 2 + [None]


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
        view.pool = pool(events=("12:00:09 actor-0 failed: OSError: no space",))
        log.follow(view)
    assert told(tmp_path)[1:] == [
        ("info", "actor", 0, None, "starting"),
        ("info", "actor", 0, None, "running"),
        ("info", "actor", 0, None, "waits for its first weights"),
        ("info", "learner", 0, 11, "published weights v11"),
        ("info", "learner", 0, 11, "fitted"),
        ("warning", "learner", 0, 11, "backspaces take over"),
        ("info", "actor", 0, 11, "has weights v11"),
        ("warning", "pool", 0, 11, "12:00:09 actor-0 failed: OSError: no space"),
        ("info", "actor", 0, 11, "gone"),
    ]


def test_why_rollouts_are_dropped_is_told_when_it_changes(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        view = RunView(tmp_path.name, [])
        for dropped, reason in ((0, None), (2, "reward is nan"), (5, "reward is nan"), (6, "reward raised E: x")):
            view.pool = pool(
                MemberStatus("actor-3", "running", 0, replace(WORKING, dropped=dropped, drop_reason=reason))
            )
            log.follow(view)
    assert told(tmp_path)[2:] == [
        ("warning", "actor", 3, 10, "dropped 2 rollouts so far, the last one because reward is nan"),
        ("warning", "actor", 3, 10, "dropped 6 rollouts so far, the last one because reward raised E: x"),
    ]


def test_how_weights_were_proven_is_told_when_it_changes(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        view = RunView(tmp_path.name, [])
        for note in (None, "noise of 0.01 nats", "noise of 0.01 nats", None, "the fingerprint alone proves them"):
            view.pool = pool(MemberStatus("actor-3", "running", 0, replace(WORKING, weights_note=note)))
            log.follow(view)
    assert told(tmp_path)[2:] == [
        ("info", "actor", 3, 10, "noise of 0.01 nats"),
        ("info", "actor", 3, 10, "the fingerprint alone proves them"),
    ]


def test_a_resumed_run_goes_on_behind_a_torn_line_and_says_how_it_ended(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / LOG_FILE).write_text('{"time": 1.0, "mess')
    with pytest.raises(RuntimeError), RunLog(tmp_path) as log:  # noqa: PT012
        log.write("info", "driver", "the run begins")
        raise RuntimeError("no more\nthan this")
    torn, *whole = (tmp_path / LOG_FILE).read_text().splitlines()
    assert torn == '{"time": 1.0, "mess'
    assert [json.loads(line)["message"] for line in whole] == [
        "the run begins",
        "the run ended: RuntimeError: no more\nthan this",
    ]


def test_a_full_disk_ends_the_run_and_hinders_nothing_on_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / LOG_FILE).symlink_to("/dev/full")
    with RunLog(tmp_path) as log:
        log.write("info", "driver", "the run begins")
        with pytest.raises(RunFailedError, match=r"run\.jsonl cannot be written: .*No space left.*; make room"):
            log.follow(RunView(tmp_path.name, [], learner=LEARNER))
        log.write("warning", "driver", "a shard did not end by itself")


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ("", "abc", "abc"),
        ("abc", "abc", ""),
        ("abc", "abcd", "d"),
        ("abc", "bcdd", "dd"),  # a full history: the oldest fell out
        ("abc", "xyz", "xyz"),
        ("aaa", "aaaa", "a"),  # the same event again
    ],
)
def test_the_news_is_what_was_not_there_before(before: str, now: str, expected: str) -> None:
    assert "".join(news(before, now)) == expected
