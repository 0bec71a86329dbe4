"""Shards of the buffer whose process hangs: it is ended, and Ray restarts it from its segments, as after a death.

Ray itself takes an actor for alive as long as its process is there, and its way to end one is to ask it to.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

import ray
from ray._private.state import actors as actor_info
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from buffer.service.shard import Shard
from launch.errors import RunFailedError


class HungShards:
    """Watches who answers. Times are seconds on one clock that never goes back."""

    def __init__(self, health_timeout_s: float) -> None:
        """health_timeout_s: silence of a process that Ray takes for alive after which it is ended."""
        self._health_timeout_s = health_timeout_s
        self._silent_since: dict[int, float] = {}
        self._ended: dict[int, int] = {}

    def heard_from(self, shard: Shard) -> None:
        """It has answered."""
        self._silent_since.pop(shard.index, None)

    def silent(self, shard: Shard) -> str | None:
        """It has not; gives a line for people where its process is ended for that.

        Raises:
            RunFailedError: it was ended for that before, and is still there: its node is out of reach.
        """
        now = time.monotonic()
        silent_since = self._silent_since.setdefault(shard.index, now)
        if now - silent_since < self._health_timeout_s:
            return None
        info = actor_info(shard.handle._actor_id.hex())
        if info.get("State") != "ALIVE":  # it is being restarted
            self._silent_since[shard.index] = now
            return None
        pid = info["Pid"]
        if self._ended.get(shard.index) == pid:
            raise RunFailedError(
                f"{shard.name} has been silent for {2 * self._health_timeout_s:.0f} s (twice buffer.health_timeout_s): "
                f"its process {pid} hangs and could not be ended, or its node is out of reach"
            )
        self._ended[shard.index] = pid
        self._silent_since[shard.index] = now
        end_process(info["Address"]["NodeID"], pid)
        return (
            f"{shard.name} was silent for {self._health_timeout_s:.0f} s (buffer.health_timeout_s): its process {pid} "
            "is ended"
        )


def end_process(node_id: str, pid: int) -> None:
    """kill -9 on another node; returns at once."""
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    ray.remote(num_cpus=0, max_retries=0)(_kill).options(scheduling_strategy=there).remote(pid)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
        os.kill(pid, signal.SIGKILL)
