"""How published weights get from the learner to the actors: through the memory of Ray's object store.

The learner holds a `WeightSender`, each actor a `WeightReceiver`. A small handle passes between them, together with the
manifest. An actor fetches the bytes when it wants them, so the learner never waits for an actor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from buffer.remote_call import RemoteCall
from buffer.weights.format import WeightPayload

if TYPE_CHECKING:
    import ray

FETCH_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class WeightHandle:
    """Where a publication lies in Ray's object store. The references are fetched only by an actor that needs them.

    static: tensors that are the same in every publication of this sender, if there are any. changed: all others.
    """

    static: ray.ObjectRef[WeightPayload] | None
    changed: ray.ObjectRef[WeightPayload]


class WeightSender:
    """The learner's end. It copies into the shared memory of its node; Ray copies that to another node once, when an
    actor there asks. The newest publication is kept alive here for actors that start later.
    """

    def __init__(self) -> None:
        self._static: ray.ObjectRef[WeightPayload] | None = None
        self._newest: WeightHandle | None = None

    def set_static(self, tensors: WeightPayload) -> None:
        """Make `tensors` part of every later publication; they travel once."""
        import ray

        self._static = ray.put(tensors)

    def publish(self, tensors: WeightPayload) -> WeightHandle:
        """Copy `tensors`, which may be written to as soon as this returns. Any number of actors can fetch the copy."""
        import ray

        self._newest = WeightHandle(self._static, ray.put(tensors))
        return self._newest


class WeightReceiver:
    """An actor's end. It maps the arrays where they lie in this node's shared memory, without a copy."""

    def __init__(self, timeout_s: float = FETCH_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._static: tuple[ray.ObjectRef[WeightPayload], WeightPayload] | None = None

    def fetch(self, handle: WeightHandle) -> WeightPayload:
        """What was published, read-only. Static tensors stay mapped, so this node never has to fetch them again.

        Raises:
            TimeoutError: it did not arrive in time. ProcessLostError: it was lost with the learner.
        """
        if handle.static is None:
            self._static = None
            return self._get(handle.changed)
        if self._static is None or self._static[0] != handle.static:
            self._static = (handle.static, self._get(handle.static))
        return self._static[1] | self._get(handle.changed)

    def _get(self, reference: ray.ObjectRef[WeightPayload]) -> WeightPayload:
        call: RemoteCall[WeightPayload] = RemoteCall(
            "the learner", reference, "give its weights through Ray's object store"
        )
        return call.result(self._timeout_s)
