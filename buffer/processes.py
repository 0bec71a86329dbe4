"""The processes of a run: how one calls another, which signals they pass over, and the name of the run.

`RemoteCall` stands in the place of `ray.get` everywhere: it gives the value, or an error that names who did not answer
or died. So no wait is endless and no error is anonymous.
"""

from __future__ import annotations

import asyncio
import ctypes
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    import ray
    from ray.actor import ActorHandle

POLL_S = 0.25
"""Between two calls of `while_waiting`."""

JOB_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""systemd, Kubernetes and `scancel` send SIGTERM, a closed terminal SIGHUP, `sbatch --signal=USR1@N` SIGUSR1."""

RUN_ID_FILE = "run_id"

T = TypeVar("T")


class NoAnswerError(TimeoutError):
    """The other process did not answer in time. It hangs, is busy, or is out of reach."""


class ProcessLostError(RuntimeError):
    """The other process died, and nothing restarts it."""


@dataclass(frozen=True)
class RemoteCall(Generic[T]):
    """A call that another process works on.

    who: the process, for messages. reference: of the value, or of an object that lies with the process.
    task: completes "WHO did not ..." where no answer comes.
    """

    who: str
    reference: ray.ObjectRef[T]
    task: str = "answer"

    def done(self, timeout_s: float = 0.0) -> bool:
        """Whether the call has ended, well or not; waits at most `timeout_s` for that."""
        return bool(ended_calls([self], timeout_s))

    def result(self, timeout_s: float, while_waiting: Callable[[], None] | None = None) -> T:
        """The value; waits at most `timeout_s` for it. while_waiting: called every `POLL_S` meanwhile.

        Raises:
            NoAnswerError: it did not come in time. ProcessLostError: the process is gone for good.
            ray.exceptions.RayTaskError: the call raised an error, its `cause`; an instance of that class, too.
        """
        import ray

        deadline = time.monotonic() + timeout_s
        while while_waiting is not None and not self.done(POLL_S) and time.monotonic() < deadline:
            while_waiting()
        with self._naming(timeout_s):
            value: T = ray.get(self.reference, timeout=max(deadline - time.monotonic(), 0.0))
        return value

    async def answer(self, timeout_s: float) -> T:
        """As `result`, on an event loop."""
        with self._naming(timeout_s):
            try:
                async with asyncio.timeout(timeout_s) as timeout:
                    value: T = await self.reference
                    return value
            except TimeoutError:
                if timeout.expired():
                    raise self.silence(timeout_s) from None
                raise  # the other process raised it

    def silence(self, timeout_s: float) -> NoAnswerError:
        """The error to raise where the call has not ended within `timeout_s`."""
        return NoAnswerError(f"{self.who} did not {self.task} within {timeout_s:g} s")

    @contextmanager
    def _naming(self, timeout_s: float) -> Iterator[None]:
        """Raise what Ray says of the process with its name."""
        import ray

        try:
            yield
        except ray.exceptions.RayTaskError:
            raise  # before the others: it is an instance of what the call raised
        except ray.exceptions.GetTimeoutError:
            raise self.silence(timeout_s) from None
        except (
            ray.exceptions.RayActorError,
            ray.exceptions.ObjectLostError,
            ray.exceptions.WorkerCrashedError,
        ) as error:
            lines = str(error).strip().splitlines()
            if getattr(error, "actor_init_failed", False):  # all but the last line is the constructor's traceback
                raise ProcessLostError(f"{self.who} could not start: {lines[-1]}") from None
            raise ProcessLostError(f"{self.who} died: {lines[0]}") from None


def ended_calls(calls: Sequence[RemoteCall[T]], timeout_s: float = 0.0) -> list[RemoteCall[T]]:
    """Those that have ended, well or not; waits at most `timeout_s` until all have."""
    import ray

    references = [call.reference for call in calls]
    ended = ray.wait(references, num_returns=len(references), timeout=timeout_s)[0] if references else []
    return [call for call in calls if call.reference in ended]


def end_actor(actor: ActorHandle, goodbye: RemoteCall[None], timeout_s: float) -> str | None:
    """Kill an actor once it has answered `goodbye`, or after `timeout_s`; gives a line for people if it did not."""
    import ray

    failure = None
    try:
        goodbye.result(max(timeout_s, 0.0))
    except (NoAnswerError, ProcessLostError) as error:
        failure = str(error)
    except ray.exceptions.RayTaskError as error:
        failure = f"{goodbye.who} did not end by itself: {error.cause}"
    ray.kill(actor)
    return failure


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


def run_id(run_folder: Path) -> str:
    """The name that the run, and no other, was given when it began; without one, the name of its folder."""
    file = run_folder / RUN_ID_FILE
    return file.read_text(encoding="utf-8").strip() if file.is_file() else run_folder.resolve().name
