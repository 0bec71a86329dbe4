"""The head of the Ray cluster under a run, watched by the driver.

Without its head Ray's client cannot disconnect: its calls block, and after a minute it ends the process itself, with a
message about gRPC.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
import typer
from rich.console import Console

from launch.errors import EXIT_RUN_FAILED
from launch.stop_signals import stop_exit_code, stop_requested

CHECK_EVERY_S = 3.0
CHECK_TIMEOUT_S = 5.0
PATIENCE_S = 45.0
"""Of the driver with a head that is silent: KubeRay can restart it. Ray's client ends the process after 60 s."""
PATIENCE_STOPPING_S = 8.0
"""After a stop signal, which Ray's own processes probably received too."""


def check_alive(target: str, timeout_s: float) -> None:
    """Ask the server there how it is, as gRPC has it; any answer will do, also that a token is missing.

    Raises:
        ConnectionError: none came in time.
    """
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=timeout_s)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE):
                raise ConnectionError(f"what listens there gave no answer within {timeout_s:.0f} s") from None


@contextmanager
def head_watched(address: str, clean_up: Callable[[], None]) -> Iterator[None]:
    """While active, a head that stays silent ends the process with one sentence. clean_up: called before that."""
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
            check_alive(address, CHECK_TIMEOUT_S)
        except ConnectionError:
            silent_s = time.monotonic() - answered_at
            if silent_s > (PATIENCE_STOPPING_S if stop_requested() else PATIENCE_S):
                clean_up()
                _end(address, silent_s)
        else:
            answered_at = time.monotonic()


def _end(address: str, silent_s: float) -> None:
    Console(stderr=True).show_cursor(True)
    typer.echo(
        f"error: the Ray cluster at {address} has been silent for {silent_s:.0f} s: its processes have ended, or are "
        "out of reach; go on from the last checkpoint with --resume",
        err=True,
    )
    sys.stdout.flush()
    os._exit(stop_exit_code() if stop_requested() else EXIT_RUN_FAILED)
