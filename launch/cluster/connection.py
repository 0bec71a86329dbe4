"""Connecting to Ray, started here for one run or a cluster that is there already, and watching its head meanwhile."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import ray
import typer
from ray._private import ray_constants
from rich.console import Console

from launch import RAY_START_VARIABLES
from launch.cluster.capacity import planned_roles, total
from launch.errors import EXIT_RUN_FAILED, RunFailedError, UserError
from launch.run_folder.folder import CLUSTER_FILE, LiveCluster, remove_cluster, write_cluster
from launch.settings.run import ClusterSettings, RunSettings
from launch.stop_signals import stop_exit_code, stop_handlers_kept, stop_requested
from launch.surroundings import provide_socket_folder

RAY_ADDRESS_VARIABLE = "RAY_ADDRESS"
LOCAL = "local"
LOOPBACK = "127.0.0.1"
CHECK_EVERY_S = 3.0
CHECK_TIMEOUT_S = 5.0
PATIENCE_S = 45.0
"""Of the driver with a head that is silent: KubeRay can restart it. Ray's client ends the process after 60 s."""
PATIENCE_STOPPING_S = 8.0
"""After a stop signal, which Ray's own processes probably received too."""


@contextlib.contextmanager
def run_cluster(settings: RunSettings, folder: Path) -> Iterator[LiveCluster]:
    """Ray for the length of a run; its namespace is the run's name. Everything the run created ends with it.
    UserError: the cluster cannot be reached. RunFailedError: Ray does not start.
    """
    try:
        _start_or_join(settings.cluster, folder.name, total(planned_roles(settings))["CPU"])
        cluster = LiveCluster(ray.get_runtime_context().gcs_address, folder.name, os.getpid())
        with _head_watched(cluster.address, lambda: remove_cluster(folder)):
            try:
                write_cluster(folder, cluster)
                yield cluster
            finally:
                remove_cluster(folder)
                _leave()
    except KeyboardInterrupt:
        _leave()  # of a stop signal while Ray started; else nothing is left of it
        raise


@contextlib.contextmanager
def join_live_run(cluster: LiveCluster, timeout_s: float = 10.0) -> Iterator[None]:
    """Connect to the Ray of a live run from another shell; UserError where nothing answers there."""
    # Ray would replace 127.0.0.1 by the outer address, where a Ray that a run started for itself does not listen.
    is_private = cluster.address.startswith(f"{LOOPBACK}:")
    try:
        with _for_this_machine_alone() if is_private else contextlib.nullcontext():
            _join(ClusterAddress(cluster.address, f"the run's {CLUSTER_FILE}"), cluster.namespace, timeout_s)
        yield
    finally:
        _leave()


@dataclass(frozen=True)
class ClusterAddress:
    """source: which setting names the address. mend: what a person may do where it is of no use."""

    address: str
    source: str
    mend: str = ""


def cluster_to_join(settings: ClusterSettings) -> ClusterAddress | None:
    """The cluster that a run joins, of the recipe before that of RAY_ADDRESS; None where it starts a Ray of its own."""
    for address, source, otherwise in (
        (settings.address, "cluster.address", "set cluster.address=local"),
        (os.environ.get(RAY_ADDRESS_VARIABLE), RAY_ADDRESS_VARIABLE, f"unset {RAY_ADDRESS_VARIABLE}"),
    ):
        if address:
            start = "start one with `ray start --head`, raise cluster.connect_timeout_s if it is slow"
            mend = f"{start}, or {otherwise} to start Ray for this run"
            return None if address == LOCAL else ClusterAddress(address, source, mend)
    return None


def _start_or_join(settings: ClusterSettings, namespace: str, planned_cpus: float) -> None:
    cluster = cluster_to_join(settings)
    if cluster is not None:
        _join(cluster, namespace, settings.connect_timeout_s)
        return
    if settings.grow_timeout_s is not None:
        raise UserError(
            "cluster.grow_timeout_s waits for nodes of a cluster, and this run starts a Ray of its own: leave it "
            "out or name the cluster with cluster.address"
        )
    # Ray announces its default (token authentication on) in the middle of the display.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    provide_socket_folder()
    try:
        with _for_this_machine_alone():
            _init_ray(
                address="local",
                namespace=namespace,
                num_cpus=settings.num_cpus or max(2 * (os.cpu_count() or 1), math.ceil(planned_cpus)),
                object_store_memory=int(settings.object_store_gib * 2**30),
                include_dashboard=False,
            )
    except Exception as error:
        # Ray waits as long as `launch.RAY_START_VARIABLES` say, and then raises `Exception` itself.
        if type(error) is not Exception and not isinstance(error, TimeoutError | ray.exceptions.RpcError):
            raise
        raise RunFailedError(
            f"Ray did not start within its own time limit ({str(error).splitlines()[0]}): the machine is very busy, or "
            f"short of memory; wait until it is quieter, or raise {' and '.join(RAY_START_VARIABLES)} (seconds)"
        ) from None


def _init_ray(**arguments: object) -> None:
    """`ray.init`, whole: a stop signal that comes meanwhile is raised once Ray stands."""
    with stop_handlers_kept():
        ray.init(configure_logging=False, log_to_driver=False, **arguments)
        worker = ray._private.worker.global_worker
        # `log_to_driver=False` leaves a thread that prints what Ray's processes report over the run's own display.
        if hasattr(worker, "listener_thread"):  # a client of Ray's (ray://) has none
            worker.threads_stopped.set()
            worker.gcs_error_subscriber.close()
            worker.listener_thread.join()
            worker.threads_stopped.clear()


def _leave() -> None:
    """Disconnect from Ray, and end the processes that were started for this run: SIGTERM does not reach them."""
    node = ray._private.worker._global_node
    started: list[psutil.Process] = []
    if node is not None and node.is_head():
        for _, process in node.live_processes():
            process.terminate = process.kill  # Ray would wait one second for each
            with contextlib.suppress(psutil.NoSuchProcess):
                started += psutil.Process(process.pid).children(recursive=True)
    with stop_handlers_kept():
        ray.shutdown()
        for each in started:  # the agents of a node would try for a minute to report its end
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


@contextlib.contextmanager
def _for_this_machine_alone() -> Iterator[None]:
    """What Ray starts here listens on 127.0.0.1 only, and what it joins here is there.

    Ray replaces `_node_ip_address="127.0.0.1"` by the machine's outer address. Its own switch
    (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, the default on macOS) would also keep this process from joining clusters, so
    it is turned for one start or joining alone.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _join(cluster: ClusterAddress, namespace: str, timeout_s: float) -> None:
    """Join a cluster; probes it before Ray does, which would try an address that is dead or hung for minutes."""
    address, mend = cluster.address, cluster.mend
    try:
        if address.startswith(("http://", "https://")):
            mend = f"it is a job server: send it the run with `sequencematch submit --address {address}`; {mend}"
            raise ConnectionError(f"{address} is no HOST:PORT")
        if address != "auto":
            host, _, port = address.removeprefix("ray://").rpartition(":")
            if not host or not port.isdigit():
                raise ConnectionError("it is neither `auto`, `local` nor HOST:PORT")
            _check_alive(f"{host}:{port}", timeout_s)
        _init_ray(address=address, namespace=namespace)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError, ray.exceptions.RpcError) as error:
        reason = "; ".join(filter(None, (str(error).splitlines()[0], mend)))
        problem = "no Ray cluster answers" if isinstance(error, ConnectionError) else "Ray cannot join the cluster"
        raise UserError(f"{problem} at {address}, which {cluster.source} names: {reason}") from None


def _check_alive(target: str, timeout_s: float) -> None:
    """ConnectionError if no server there answers in time; any answer will do, also that a token is missing."""
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=timeout_s)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                raise ConnectionError(error.details()) from None
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise ConnectionError(f"what listens there gave no answer within {timeout_s:.0f} s") from None


@contextlib.contextmanager
def _head_watched(address: str, clean_up: Callable[[], None]) -> Iterator[None]:
    """While active, a head that stays silent ends the process with one sentence: without it Ray's calls block.

    clean_up: called before that.
    """
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(address, clean_up, done), name="head-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=2 * CHECK_TIMEOUT_S)


def _watch(address: str, clean_up: Callable[[], None], done: threading.Event) -> None:
    answered_at = time.monotonic()
    while not done.wait(CHECK_EVERY_S):
        try:
            _check_alive(address, CHECK_TIMEOUT_S)
        except ConnectionError:
            silent_s = time.monotonic() - answered_at
            if silent_s > (PATIENCE_STOPPING_S if stop_requested() else PATIENCE_S):
                clean_up()
                Console(stderr=True).show_cursor(True)
                typer.echo(
                    f"error: the Ray cluster at {address} has been silent for {silent_s:.0f} s: its processes have "
                    "ended, or are out of reach; go on from the last checkpoint with --resume",
                    err=True,
                )
                sys.stdout.flush()
                os._exit(stop_exit_code() if stop_requested() else EXIT_RUN_FAILED)
        else:
            answered_at = time.monotonic()
