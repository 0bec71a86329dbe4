"""The signals by which job systems ask processes to stop, and how the processes of a run on Ray pass over them."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Iterator
from contextlib import contextmanager

JOB_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""systemd, Kubernetes and `scancel` send SIGTERM, a closed terminal SIGHUP, `sbatch --signal=USR1@N` SIGUSR1."""


def ignore_stop_signals() -> None:
    """Called by the constructor of each Ray actor of a run: from now on the driver alone decides when the run stops.

    Job systems signal all processes of a job at once. Ray's own handler would end the learner before its checkpoint.
    Ray still ends the process: it follows up with SIGKILL. Outside of a Ray worker process nothing changes.
    """
    import ray  # the command line imports this module and must start without Ray

    # Asked first, because the runtime context starts a Ray where there is none.
    if not ray.is_initialized() or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return
    # Not `signal.signal`: Ray constructs asyncio actors outside of the main thread.
    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    for number in JOB_SIGNALS:
        set_handler(number, int(signal.SIG_IGN))


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Around the start of processes, in the main thread: they never receive the signals of job systems, nor do the
    processes that those start. A signal mask is inherited, and neither Ray's servers nor Python reset it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
