"""How published weights get from the learner to the actors.

The learner holds a `WeightSender`, each actor a `WeightReceiver`. What passes between them is a small handle, announced
together with the manifest; the bytes follow when an actor takes them. So a sender never waits for an actor, and an
actor that comes late, is slow or dies holds up nobody.

There are two transports: Ray's object store, here, and `buffer.collective`, from device to device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from buffer.collective.handle import OfferedWeights
from buffer.collective.receiver import CollectiveReceiver
from buffer.weights import Payload, TensorEntry, WeightPayload, pack_tensors

if TYPE_CHECKING:
    import ray
    import torch

TAKE_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class StoredWeights:
    """Where a publication lies in Ray's object store. The references are fetched only by whoever takes it.

    kept: tensors that are the same in every publication of this sender, if there are any. changed: all others.
    """

    kept: ray.ObjectRef[WeightPayload] | None
    changed: ray.ObjectRef[WeightPayload]


WeightHandle = StoredWeights | OfferedWeights


class WeightSender(Protocol):
    """The learner's end. It keeps and offers what its own `pack` made."""

    def pack(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[Payload, tuple[TensorEntry, ...]]:
        """Bring named tensors into the form that travels; until they are offered nobody may write to them.

        Raises:
            ValueError: a name comes twice, or a tensor has a dtype that the format does not carry.
        """

    def keep(self, tensors: Payload) -> None:
        """Make `tensors` part of every later offer; they travel once."""

    def offer(self, tensors: Payload) -> WeightHandle:
        """A snapshot of `tensors`, beside what is kept, that any number of actors can take; waits for none of them."""


class WeightReceiver:
    """An actor's end: takes publications by whatever transport their handle is of."""

    def __init__(self) -> None:
        self._object_store = ObjectStoreReceiver()
        self._collective = CollectiveReceiver()

    def take(self, handle: WeightHandle) -> Payload:
        """What was offered, to be read only.

        Raises:
            TimeoutError: it did not arrive in time. WeightsReplacedError: a newer publication is on offer, whose
            announcement is on its way. ConnectionError: the learner died, hung or left, or does not know the token.
            ValueError: the weights are on a GPU and this process has none.
        """
        if isinstance(handle, StoredWeights):
            return self._object_store.take(handle)
        return self._collective.take(handle)


class ObjectStoreSender:
    """Copies into the shared memory of this node; Ray brings that to each other node once, when an actor there asks.

    The newest offer is kept alive here for actors that are yet to come.
    """

    def __init__(self) -> None:
        self._kept: ray.ObjectRef[WeightPayload] | None = None
        self._newest: StoredWeights | None = None

    def pack(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[Payload, tuple[TensorEntry, ...]]:
        """See `WeightSender`. Contiguous tensors in host memory are not copied before they are offered."""
        return pack_tensors(tensors)

    def keep(self, tensors: Payload) -> None:
        """See `WeightSender`."""
        import ray

        self._kept = ray.put(tensors)

    def offer(self, tensors: Payload) -> StoredWeights:
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
