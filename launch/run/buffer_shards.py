"""The replay buffer of a run: one Ray actor for each shard, over `RUN/buffer/shard-KKK`.

Ray restarts a shard whose process dies; it opens its folder again and goes on with everything that it acknowledged, and
Ray repeats the calls that were not answered (each can be repeated without harm). A shard is placed on a node of its own
as far as there are so many, and goes back to its node; where that one is gone, to another, since the folder lies in the
run folder, which all nodes that hold shards have to see.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import ray

from actors.pool.ray_crew import at_best_on
from buffer.service.service import ReplayBufferService
from buffer.service.shard import Shard, present_shards, shard_folder, shard_seed, shard_settings
from buffer.service.status import BufferStatus, ShardStatus
from buffer.settings import BufferSettings
from buffer.store.previous_format import holds_previous_format
from buffer.store.replay_store import ReplayStore
from buffer.trajectory.schema import TokenContract
from launch.errors import RunFailedError, UserError
from launch.run.hung_shards import HungShards
from launch.run_folder.flight_token import flight_token

MAX_RESTARTS = 4
"""Deaths of one shard that a run survives; the next one ends it, since somebody has to look for the cause."""

PLACED_BYTES = 1
"""Of memory, which a shard has Ray set aside: a process that asks for nothing at all Ray puts on a node by chance,
whatever its scheduling strategy says, unless that is bound to the node for good.
"""

STATUS_TIMEOUT_S = 3.0
"""A shard that is restarted answers later; it is shown as silent meanwhile."""

BIRTH_TIMEOUT_S = 120.0
CLOSE_TIMEOUT_S = 60.0

T = TypeVar("T")


def shard_actor_name(index: int) -> str:
    """Name of a shard's actor in the namespace of the run."""
    return f"buffer-{index}"


def check_buffer(folder: Path, contract: TokenContract, settings: BufferSettings) -> None:
    """Open the buffer of a run that resumes once here: a Ray actor that fails at birth tells only a traceback.

    Raises:
        UserError: a shard cannot be opened, or the run had more shards than it has now.
    """
    if holds_previous_format(folder):
        raise UserError(
            f"{folder} was written by an earlier version of this program, which left no record of what it removed; "
            "its trajectories can be read with `sequencematch query`, but no run goes on with them. Move the folder "
            "away to go on from the checkpoints with an empty buffer"
        )
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


class BufferShards:
    """The shards of one run; they start at once, and are ready when the first call is answered."""

    def __init__(self, folder: Path, contract: TokenContract, settings: BufferSettings, seed: int) -> None:
        """folder: of the whole buffer, in the run folder. seed: of the run."""
        folder.mkdir(parents=True, exist_ok=True)
        nodes = _nodes()
        token = flight_token(folder.parent) if settings.flight.enabled else None
        self.shards = tuple(
            Shard(
                index,
                ray.remote(ReplayBufferService)
                .options(
                    name=shard_actor_name(index),
                    num_cpus=0,  # its work is short beside that of engines and learner
                    memory=PLACED_BYTES,
                    max_restarts=MAX_RESTARTS,
                    max_task_retries=-1,  # of a call that its death left unanswered, as often as it is restarted
                    scheduling_strategy=at_best_on(nodes[index % len(nodes)]),
                )
                .remote(
                    str(shard_folder(folder, index)),
                    contract,
                    shard_settings(settings, index),
                    shard_seed(seed, index),
                    token,
                ),
                nodes[index % len(nodes)],
            )
            for index in range(settings.shards)
        )
        self._pids: dict[int, int] = {}
        self._hung = HungShards(settings.health_timeout_s)

    def newest_version(self, while_waiting: Callable[[], None]) -> int:
        """Newest policy version that a shard knows of, -1 before any; waits until all shards stand.

        while_waiting: called now and then.

        Raises:
            RunFailedError: a shard does not start.
        """
        calls = [(shard, shard.handle.newest_version.remote()) for shard in self.shards]
        deadline = time.monotonic() + BIRTH_TIMEOUT_S
        newest = -1
        for shard, reference in calls:
            while not ray.wait([reference], timeout=0.25)[0]:
                while_waiting()
                if time.monotonic() > deadline:
                    raise RunFailedError(f"waited {BIRTH_TIMEOUT_S:.0f} s for {shard.name} to open")
            newest = max(newest, _answer(int, shard, reference))
        return newest

    def status(self, tell: Callable[[str], None]) -> BufferStatus:
        """What every shard says; None of one that does not answer now, whose process is ended if that lasts.

        tell: takes a line on a shard that was ended for its silence, or came back.

        Raises:
            RunFailedError: a shard died and does not come back, or hangs where nobody can end it.
        """
        statuses = shard_statuses(self.shards)
        for shard, status in zip(self.shards, statuses, strict=True):
            if status is None:
                if (line := self._hung.silent(shard)) is not None:
                    tell(line)
                continue
            self._hung.heard_from(shard)
            before = self._pids.get(shard.index, status.pid)
            if before != status.pid:
                tell(f"{shard.name} died (process {before}) and was restarted from its segments (process {status.pid})")
            self._pids[shard.index] = status.pid
        return BufferStatus(statuses)

    def close(self, tell: Callable[[str], None]) -> None:
        """Let every shard make its rows durable, then end the processes. tell: takes a line on one that does not."""
        calls = [shard.handle.close.remote() for shard in self.shards]
        ray.wait(calls, num_returns=len(calls), timeout=CLOSE_TIMEOUT_S)
        for shard, reference in zip(self.shards, calls, strict=True):
            try:
                ray.get(reference, timeout=0)
            except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
                tell(f"{shard.name} did not end by itself: {type(error).__name__}")
            ray.kill(shard.handle)


def find_shards(count: int) -> list[Shard] | None:
    """The shards of the live run that this process has joined; None where the run has no buffer (yet)."""
    found = []
    for index in range(count):
        try:
            found.append(Shard(index, ray.get_actor(shard_actor_name(index)), node_id=""))
        except ValueError:  # Ray's answer for a name that nobody has
            return None
    return found


def shard_statuses(shards: Sequence[Shard]) -> tuple[ShardStatus | None, ...]:
    """What each shard says, None of one that does not answer now.

    Raises:
        RunFailedError: a shard died and does not come back.
    """
    calls = [shard.handle.status.remote() for shard in shards]
    done = set(ray.wait(calls, num_returns=len(calls), timeout=STATUS_TIMEOUT_S)[0])
    return tuple(
        _answer(ShardStatus, shard, reference) if reference in done else None
        for shard, reference in zip(shards, calls, strict=True)
    )


def _answer(kind: type[T], shard: Shard, reference: ray.ObjectRef) -> T:
    """The value of a call that is done."""
    try:
        value = ray.get(reference, timeout=STATUS_TIMEOUT_S)
    except ray.exceptions.RayActorError as error:
        lines = str(error).strip().splitlines()
        if error.actor_init_failed:  # the rest is the traceback of the constructor
            raise RunFailedError(f"{shard.name} could not open its folder: {lines[-1]}") from None
        raise RunFailedError(f"{shard.name} died: {lines[0]}") from None
    assert isinstance(value, kind)
    return value


def _nodes() -> list[str]:
    """Ids of the live nodes, this one first, the others in a fixed order."""
    here = ray.get_runtime_context().get_node_id()
    others = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here)
    return [here, *others]
