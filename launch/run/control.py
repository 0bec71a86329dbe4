"""Looking at and steering a live run from another shell: `sequencematch status` and `sequencematch scale`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import ray
from ray.actor import ActorHandle
from rich.console import Group, RenderableType

from actors.pool.controller import PoolStatus
from buffer.remote_call import RemoteCall
from launch.cluster.capacity import check_possible
from launch.cluster.connection import join_live_run
from launch.errors import UserError, lost_processes_reported
from launch.monitoring.live_view import RunView, render, shard_table
from launch.run.buffer_shards import STATUS_TIMEOUT_S, find_buffer
from launch.run.driver import POOL, POOL_NAME
from launch.run.learner_group import LEARNER_NAME, learner_status
from launch.run_folder.checkpoints import finished_stages
from launch.run_folder.folder import CLUSTER_FILE, open_run_folder, read_cluster

ANSWER_TIMEOUT_S = 15.0


@dataclass(frozen=True)
class RunStatus:
    """What the processes of a live run say. The view has no pool and no buffer where the run has no actors (yet)."""

    folder: Path
    elapsed_s: float
    view: RunView

    def to_json(self) -> dict[str, object]:
        """All counters."""
        view = self.view
        return {
            "run": str(self.folder),
            "elapsed_s": round(self.elapsed_s, 1),
            "finished_stages": list(view.results),
            "learner": view.learner and asdict(view.learner),
            "pool": view.pool and asdict(view.pool),
            "buffer": view.buffer and asdict(view.buffer),
        }

    def render(self) -> RenderableType:
        """As the run itself shows it."""
        shown = render(self.view, self.elapsed_s)
        if self.view.buffer is None or len(self.view.buffer.shards) > 1:  # then the display shows the shards itself
            return shown
        return Group(shown, shard_table(self.view.buffer))


def run_status(path: Path) -> RunStatus:
    """Ask the processes of a live run how they are.

    Raises:
        UserError: `path` is no run, or the run is not live. RunFailedError: a process does not answer.
    """
    folder, settings = open_run_folder(path)
    cluster_file = folder / CLUSTER_FILE
    elapsed_s = time.time() - cluster_file.stat().st_mtime if cluster_file.is_file() else 0.0
    view = RunView(folder.name, settings.stages, results=finished_stages(settings, folder))
    with _live_run(folder) as leader:
        view.learner = learner_status(leader).result(ANSWER_TIMEOUT_S)
        view.note = "" if view.learner.stage else view.learner.activity
        if (pool := _find(POOL_NAME)) is not None:
            view.pool = RemoteCall[PoolStatus](POOL, pool.status.remote()).result(ANSWER_TIMEOUT_S)
        if (buffer := find_buffer(settings.buffer.shards)) is not None:
            view.buffer = buffer.status(STATUS_TIMEOUT_S)
    return RunStatus(folder, elapsed_s, view)


def scale_run(path: Path, count: int) -> PoolStatus:
    """Set the number of rollout actors of a live run; returns before they have come or gone.

    Raises:
        UserError: `path` is no live run, it has no actor pool, or the cluster has no room for so many.
        RunFailedError: the pool does not answer.
    """
    folder, settings = open_run_folder(path)
    with _live_run(folder):
        pool = _find(POOL_NAME)
        if pool is None:
            raise UserError(
                f"run {folder.name} has no rollout actors: none of its stages needs them, or it is starting"
            )
        check_possible(settings, count)
        return RemoteCall[PoolStatus](POOL, pool.scale.remote(count)).result(ANSWER_TIMEOUT_S)


def catalog_image(path: Path, shard: Path) -> bytes:
    """The catalog of the shard in a folder, asked of the live run: see `buffer.reading.snapshot.read_shard`.

    Raises:
        UserError: the run is not live. RunFailedError: the shard does not answer.
    """
    folder, settings = open_run_folder(path)
    with _live_run(folder):
        if (buffer := find_buffer(settings.buffer.shards)) is None:
            raise UserError(f"run {folder.name} has no replay buffer (yet)")
        asked = buffer.shards[int(shard.name.rpartition("-")[2])]
        return RemoteCall[bytes](asked.name, asked.handle.catalog_image.remote()).result(ANSWER_TIMEOUT_S)


@contextmanager
def _live_run(folder: Path) -> Iterator[ActorHandle]:
    """Connect to a live run; gives its learner, which every run has from its first moment."""
    cluster = read_cluster(folder)
    remedy = (
        f"If its driver (process {cluster.driver_pid}) ended without cleaning up, go on with `sequencematch train "
        f"--resume {folder}`, or delete {folder / CLUSTER_FILE}"
    )
    with lost_processes_reported(), ExitStack() as stack:
        try:
            stack.enter_context(join_live_run(cluster))
            if (learner := _find(LEARNER_NAME)) is None:
                raise UserError(f"the Ray at {cluster.address} has no learner of this run")
        except UserError as error:
            raise UserError(f"run {folder.name} cannot be reached: {error}. {remedy}") from None
        yield learner


def _find(name: str) -> ActorHandle | None:
    """A named actor in the namespace of the run."""
    try:
        return ray.get_actor(name)
    except ValueError:  # Ray's answer for a name that nobody has
        return None
