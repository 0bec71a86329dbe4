"""The replay buffer of a run: one Ray actor for each shard, over `RUN/buffer/shard-KKK`.

Ray restarts a shard whose process dies, if possible on the same node. The shard opens its folder again, and Ray repeats
the unanswered calls; a repeated call changes nothing. Ray does not notice a process that hangs, so `ShardWatch` kills
it, and Ray restarts the shard as after a crash.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import ray
from ray._private.state import actors as actor_info
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.pool.ray_pool import at_best_on
from buffer.service.client import BufferClient, Shard
from buffer.service.service import ReplayBufferService
from buffer.service.shard import BufferStatus, present_shards, shard_folder, shard_seed, shard_settings
from buffer.settings import BufferSettings
from buffer.store.store import ReplayStore
from buffer.trajectory.schema import TokenContract
from launch.cluster.capacity import live_nodes
from launch.errors import RunFailedError, UserError
from launch.run_folder.folder import flight_token

MAX_RESTARTS = 4
"""Restarts of one shard; a shard that dies more often has a defect that a restart does not repair."""

PLACED_BYTES = 1
"""Of memory: for a process that requests no resource, Ray ignores the scheduling strategy and picks a random node."""

STATUS_TIMEOUT_S = 3.0
"""A shard that restarts takes longer; the status shows it as silent until then."""


def check_buffer(folder: Path, contract: TokenContract, settings: BufferSettings) -> None:
    """Open each shard of a resumed run once in this process: an error in a Ray actor would show only a traceback.
    UserError: a shard cannot be opened, or the run had more shards than now.
    """
    present = present_shards(folder)
    if len(present) > settings.shards:
        raise UserError(
            f"{folder} has {len(present)} shards and buffer.shards is {settings.shards}: trajectories of the others "
            f"would be lost to the steps that have to be repeated; resume with buffer.shards={len(present)}"
        )
    for index, path in enumerate(present):
        try:
            ReplayStore(path, contract, shard_settings(settings, index), seed=0).close()
        except (ValueError, OSError) as error:
            raise UserError(str(error)) from None


def start_buffer(folder: Path, contract: TokenContract, settings: BufferSettings, seed: int) -> BufferClient:
    """Start the shards of a run over `folder`; they are ready when the first call is answered."""
    folder.mkdir(parents=True, exist_ok=True)
    nodes = [node.node_id for node in live_nodes()]
    token = flight_token(folder.parent) if settings.flight.enabled else None
    shards = []
    for index in range(settings.shards):
        node_id = nodes[index % len(nodes)]
        actor = ray.remote(ReplayBufferService).options(
            name=_actor_name(index),
            num_cpus=0,  # it needs little CPU compared with engines and learner
            memory=PLACED_BYTES,
            max_restarts=MAX_RESTARTS,
            max_task_retries=-1,  # repeat calls that a restart left unanswered
            scheduling_strategy=at_best_on(node_id),
        )
        handle = actor.remote(
            str(shard_folder(folder, index)), contract, shard_settings(settings, index), shard_seed(seed, index), token
        )
        shards.append(Shard(index, handle, node_id))
    return BufferClient(shards)


def find_buffer(count: int) -> BufferClient | None:
    """The `count` shards of the live run that this process has joined; None where the run has no buffer (yet)."""
    try:
        return BufferClient([Shard(index, ray.get_actor(_actor_name(index))) for index in range(count)])
    except ValueError:  # Ray raises this for an unknown name
        return None


class ShardWatch:
    """Detects which shards were restarted, and kills those whose process hangs."""

    def __init__(self, shards: Sequence[Shard], health_timeout_s: float) -> None:
        """health_timeout_s: a process that Ray reports as alive is killed after this time without an answer."""
        self._shards = shards
        self._health_timeout_s = health_timeout_s
        self._pids: dict[int, int] = {}
        self._silent_since: dict[int, float] = {}
        self._ended: dict[int, int] = {}

    def look(self, status: BufferStatus) -> list[str]:
        """A message for each shard that restarted or is killed; RunFailedError if one hangs and cannot be killed."""
        lines = []
        for shard, answer in zip(self._shards, status.shards, strict=True):
            if answer is None:
                lines += self._end_if_hung(shard)
                continue
            self._silent_since.pop(shard.index, None)
            before, self._pids[shard.index] = self._pids.get(shard.index, answer.pid), answer.pid
            if before != answer.pid:
                lines.append(
                    f"{shard.name} died (process {before}) and was restarted from its segments (process {answer.pid})"
                )
        return lines

    def _end_if_hung(self, shard: Shard) -> list[str]:
        now, silence = time.monotonic(), f"{self._health_timeout_s:.0f} s (buffer.health_timeout_s)"
        if now - self._silent_since.setdefault(shard.index, now) < self._health_timeout_s:
            return []
        self._silent_since[shard.index] = now
        info = actor_info(shard.handle._actor_id.hex())
        if info.get("State") != "ALIVE":  # it is being restarted
            return []
        pid = info["Pid"]
        if self._ended.get(shard.index) == pid:
            raise RunFailedError(
                f"{shard.name} has been silent for twice {silence}: its process {pid} hangs and could not be ended, or "
                "its node is out of reach"
            )
        self._ended[shard.index] = pid
        end_process(info["Address"]["NodeID"], pid)
        return [f"{shard.name} was silent for {silence}: its process {pid} is ended"]


def end_process(node_id: str, pid: int) -> None:
    """kill -9 on another node; returns at once."""
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    ray.remote(num_cpus=0, max_retries=0)(_kill).options(scheduling_strategy=there).remote(pid)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
        os.kill(pid, signal.SIGKILL)


def _actor_name(index: int) -> str:
    """The Ray actor of a shard, in the namespace of the run."""
    return f"buffer-{index}"
