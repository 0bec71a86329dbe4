"""Inspect and control a live run from another shell: `sequencematch status` and `sequencematch scale`.

Every function raises UserError if the run is not live, and RunFailedError if a process does not answer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import ray
from ray.actor import ActorHandle

from actors.pool.controller import PoolStatus
from buffer.processes import RemoteCall
from launch.cluster.capacity import check_possible
from launch.cluster.connection import join_live_run
from launch.errors import UserError, lost_processes_reported
from launch.monitoring.live_view import RunView
from launch.run.buffer_shards import STATUS_TIMEOUT_S, find_buffer
from launch.run.driver import POOL, POOL_NAME, pool_status
from launch.run.learner_group import LEARNER_NAME, learner_status
from launch.run_folder.checkpoints import finished_stages
from launch.run_folder.folder import CLUSTER_FILE, open_run_folder, read_cluster

ANSWER_TIMEOUT_S = 15.0


def run_status(path: Path) -> RunView:
    """Request the status of all processes of a live run; pool and buffer are None while the run has no actors."""
    folder, settings = open_run_folder(path)
    cluster_file = folder / CLUSTER_FILE
    view = RunView(folder.name, settings.stages, results=finished_stages(settings, folder))
    view.elapsed_s = time.time() - cluster_file.stat().st_mtime if cluster_file.is_file() else 0.0
    with _live_run(folder) as leader:
        view.learner = learner_status(leader).result(ANSWER_TIMEOUT_S)
        view.note = "" if view.learner.stage else view.learner.activity
        if (pool := _find(POOL_NAME)) is not None:
            view.pool = pool_status(pool).result(ANSWER_TIMEOUT_S)
        if (buffer := find_buffer(settings.buffer.shards)) is not None:
            view.buffer = buffer.status(STATUS_TIMEOUT_S)
    return view


def status_to_json(path: Path, view: RunView) -> dict[str, object]:
    """All counters of a run's status."""
    return {
        "run": str(path.resolve()),
        "elapsed_s": round(view.elapsed_s, 1),
        "finished_stages": list(view.results),
        "learner": view.learner and asdict(view.learner),
        "pool": view.pool and asdict(view.pool),
        "buffer": view.buffer and asdict(view.buffer),
    }


def scale_run(path: Path, count: int) -> PoolStatus:
    """Set the number of rollout actors of a live run; returns before they start or stop. UserError: the cluster has too
    little capacity."""
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
    """Fetch the catalog of the shard in folder `shard` from the live run: see `buffer.reading.snapshot.read_shard`."""
    folder, settings = open_run_folder(path)
    with _live_run(folder):
        if (buffer := find_buffer(settings.buffer.shards)) is None:
            raise UserError(f"run {folder.name} has no replay buffer (yet)")
        asked = buffer.shards[int(shard.name.rpartition("-")[2])]
        return RemoteCall[bytes](asked.name, asked.handle.catalog_image.remote()).result(ANSWER_TIMEOUT_S)


@contextmanager
def _live_run(folder: Path) -> Iterator[ActorHandle]:
    """Connect to a live run; yields its learner, the first process that a run starts."""
    cluster = read_cluster(folder)
    with lost_processes_reported(), ExitStack() as stack:
        try:
            stack.enter_context(join_live_run(cluster))
            if (learner := _find(LEARNER_NAME)) is None:
                raise UserError(f"the Ray at {cluster.address} has no learner of this run")
        except UserError as error:
            raise UserError(
                f"run {folder.name} cannot be reached: {error}. If its driver (process {cluster.driver_pid}) ended "
                f"without cleaning up, go on with `sequencematch train --resume {folder}`, or delete "
                f"{folder / CLUSTER_FILE}"
            ) from None
        yield learner


def _find(name: str) -> ActorHandle | None:
    """A named actor in the namespace of the run."""
    try:
        return ray.get_actor(name)
    except ValueError:  # Ray raises this for an unknown name
        return None
