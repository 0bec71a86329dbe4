"""When the process of a silent shard is ended, with a clock and a Ray that do as the test says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from buffer.service.client import Shard
from buffer.service.shard import BufferStatus
from launch.errors import RunFailedError
from launch.run import buffer_shards
from launch.run.buffer_shards import ShardWatch

SHARD = Shard(1, SimpleNamespace(_actor_id=b"actor"), "node-a")


@pytest.fixture
def script(monkeypatch):
    """now_s, state and pid: as Ray has them; ended: what was asked to be ended."""
    script = SimpleNamespace(now_s=0.0, state="ALIVE", pid=7, ended=[])

    def info(actor_id):
        assert actor_id == SHARD.handle._actor_id.hex()
        return {"State": script.state, "Pid": script.pid, "Address": {"NodeID": "node-b"}}

    monkeypatch.setattr(buffer_shards.time, "monotonic", lambda: script.now_s)
    monkeypatch.setattr(buffer_shards, "actor_info", info)
    monkeypatch.setattr(buffer_shards, "end_process", lambda node_id, pid: script.ended.append((node_id, pid)))
    return script


@pytest.fixture
def watch():
    return ShardWatch([SHARD], 10.0)


def answered(watch, pid=7):
    return watch.look(BufferStatus((SimpleNamespace(pid=pid),)))


def silent_at(watch, script, now_s):
    script.now_s = now_s
    return watch.look(BufferStatus((None,)))


def test_who_is_silent_for_long_is_ended_where_it_is_now(watch, script):
    assert silent_at(watch, script, 0.0) == []
    assert silent_at(watch, script, 9.0) == []
    assert answered(watch) == []
    assert silent_at(watch, script, 11.0) == [], "it has answered meanwhile"
    assert silent_at(watch, script, 21.0) == [
        "shard 1 of the replay buffer was silent for 10 s (buffer.health_timeout_s): its process 7 is ended"
    ]
    assert script.ended == [("node-b", 7)], "not where it was placed once"
    assert answered(watch, 8) == [
        "shard 1 of the replay buffer died (process 7) and was restarted from its segments (process 8)"
    ]


def test_who_is_being_restarted_has_all_its_time_afterwards(watch, script):
    silent_at(watch, script, 0.0)
    silent_at(watch, script, 10.0)
    script.state = "RESTARTING"
    for now_s in (20.0, 31.0, 45.0):
        assert silent_at(watch, script, now_s) == []
    script.state, script.pid = "ALIVE", 8
    assert silent_at(watch, script, 50.0) == []
    (line,) = silent_at(watch, script, 55.0)
    assert "process 8" in line
    assert script.ended == [("node-b", 7), ("node-b", 8)]


def test_who_cannot_be_ended_ends_the_run(watch, script):
    silent_at(watch, script, 0.0)
    silent_at(watch, script, 10.0)
    assert silent_at(watch, script, 19.0) == []
    with pytest.raises(RunFailedError, match=r"silent for twice 10 s .* process 7 hangs and could not be ended"):
        silent_at(watch, script, 20.0)
    assert len(script.ended) == 1
