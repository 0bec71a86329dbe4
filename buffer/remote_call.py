"""One call to another process: its value, or an error that names who did not answer or died.

`RemoteCall` stands in the place of `ray.get` everywhere, so that no wait is endless and no error is anonymous.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    import ray
    from ray.actor import ActorHandle

POLL_S = 0.25
"""Between two calls of `while_waiting`."""

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
        except ray.exceptions.RayActorError as error:
            lines = str(error).strip().splitlines()
            if error.actor_init_failed:  # all but the last line is the traceback of the constructor
                raise ProcessLostError(f"{self.who} could not start: {lines[-1]}") from None
            raise ProcessLostError(f"{self.who} died: {lines[0]}") from None
        except (ray.exceptions.ObjectLostError, ray.exceptions.WorkerCrashedError) as error:
            raise ProcessLostError(f"{self.who} died: {str(error).strip().splitlines()[0]}") from None


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
