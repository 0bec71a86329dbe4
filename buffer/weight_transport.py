"""How published weights get from the learner to the actors.

The learner holds a `WeightSender`, each actor a `WeightReceiver`. What passes between them is a small handle, announced
together with the manifest; the bytes follow when an actor takes them. So a sender never waits for an actor, and an
actor that comes late, is slow or dies holds up nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from buffer.weights import WeightPayload

if TYPE_CHECKING:
    import ray

TAKE_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class StoredWeights:
    """Where a publication lies in Ray's object store. The references are fetched only by whoever takes it.

    kept: tensors that are the same in every publication of this sender, if there are any. changed: all others.
    """

    kept: ray.ObjectRef[WeightPayload] | None
    changed: ray.ObjectRef[WeightPayload]


class WeightSender(Protocol):
    """The learner's end."""

    def keep(self, tensors: WeightPayload) -> None:
        """Make `tensors` part of every later offer; they travel once."""

    def offer(self, tensors: WeightPayload) -> StoredWeights:
        """A snapshot of `tensors`, beside what is kept, that any number of actors can take; waits for none of them."""


class WeightReceiver(Protocol):
    """An actor's end."""

    def take(self, handle: StoredWeights) -> WeightPayload:
        """What was offered, to be read only.

        Raises:
            TimeoutError: it did not arrive in time.
        """


class ObjectStoreSender:
    """Copies into the shared memory of this node; Ray brings that to each other node once, when an actor there asks.

    The newest offer is kept alive here for actors that are yet to come.
    """

    def __init__(self) -> None:
        self._kept: ray.ObjectRef[WeightPayload] | None = None
        self._newest: StoredWeights | None = None

    def keep(self, tensors: WeightPayload) -> None:
        """See `WeightSender`."""
        import ray

        self._kept = ray.put(tensors)

    def offer(self, tensors: WeightPayload) -> StoredWeights:
        """See `WeightSender`. The tensors may be written to as soon as this returns."""
        import ray

        self._newest = StoredWeights(self._kept, ray.put(tensors))
        return self._newest


class ObjectStoreReceiver:
    """Maps the arrays where they lie in this node's shared memory: no copy, and each node receives them once."""

    def __init__(self, timeout_s: float = TAKE_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._kept: tuple[ray.ObjectRef[WeightPayload], WeightPayload] | None = None

    def take(self, handle: StoredWeights) -> WeightPayload:
        """See `WeightReceiver`. What is kept stays mapped, so that this node never has to ask for it again."""
        if handle.kept is None:
            self._kept = None
            return self._get(handle.changed)
        if self._kept is None or self._kept[0] != handle.kept:
            self._kept = (handle.kept, self._get(handle.kept))
        return self._kept[1] | self._get(handle.changed)

    def _get(self, reference: ray.ObjectRef[WeightPayload]) -> WeightPayload:
        import ray

        try:
            payload: WeightPayload = ray.get(reference, timeout=self._timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise TimeoutError(
                f"the learner's weights did not come through Ray's object store within {self._timeout_s:.0f} s"
            ) from None
        return payload
