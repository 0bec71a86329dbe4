"""The learner's end: snapshots on its device, and threads that send the newest to whoever asks."""

from __future__ import annotations

import logging
import secrets
import socket
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from buffer.collective.buckets import BucketedTensors, Layout
from buffer.collective.control import NO_PART, Channel, Request, Word
from buffer.collective.handle import OfferedPart, OfferedWeights
from buffer.collective.pair import SENDER, Pair, backend_for
from buffer.rendezvous import open_rendezvous
from buffer.weights import Payload, TensorEntry

if TYPE_CHECKING:
    import torch

HELLO_TIMEOUT_S = 10.0
"""Longest wait for a word that costs the other end nothing."""
CONNECT_TIMEOUT_S = 20.0
"""Longest wait for the process group of a transfer."""
STALL_TIMEOUT_S = 20.0
"""Longest wait for one bucket to be taken, or to come."""
QUEUE_TIMEOUT_S = 120.0
"""Longest wait for a place among the transfers."""
MAX_TRANSFERS = 4
MAX_CONNECTIONS = 1024
"""Those of actors that wait for a place, and of strangers, until they are found out."""

logger = logging.getLogger(__name__)


class CollectiveSender:
    """Holds the newest publication, and the one before while it is being sent; no method waits for an actor.

    A transfer that stalls is given up after STALL_TIMEOUT_S. Until then it occupies one of MAX_TRANSFERS places, and
    the memory of one bucket.
    """

    def __init__(self, host: str, device: torch.device, stall_timeout_s: float = STALL_TIMEOUT_S) -> None:
        """host: address of this node, on which alone is listened. device: of the tensors that will be packed."""
        self._host = host
        self._device = device
        self._stall_timeout_s = stall_timeout_s
        self._token = secrets.token_bytes(32)
        self._lock = threading.Lock()  # guards the parts
        self._num_parts = 0
        self._kept: _Part | None = None
        self._newest: _Part | None = None
        self._previous: _Part | None = None
        self._places = threading.BoundedSemaphore(MAX_TRANSFERS)
        self._connections = threading.BoundedSemaphore(MAX_CONNECTIONS)
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        self._listening = socket.create_server((host, 0), family=family, backlog=128)
        self._port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._listen, name="weights-listen", daemon=True).start()

    def pack(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[BucketedTensors, tuple[TensorEntry, ...]]:
        """See `WeightSender`. Ends what is still being sent of the publication before the newest: two fit in memory."""
        with self._lock:
            if self._previous is not None:
                self._previous.withdraw()
                self._previous = None
        packed = BucketedTensors.copy_of(tensors)
        return packed, packed.entries

    def keep(self, tensors: Payload) -> None:
        """See `WeightSender`."""
        with self._lock:
            self._kept = self._part(tensors)

    def offer(self, tensors: Payload) -> OfferedWeights:
        """See `WeightSender`. Raises nothing and waits for nobody: the tensors are a snapshot already."""
        with self._lock:
            self._previous = self._newest
            self._newest = self._part(tensors)
            kept = None if self._kept is None else self._kept.offered
            backend = backend_for(self._device)
            return OfferedWeights(self._host, self._port, self._token, backend, kept, self._newest.offered)

    def close(self) -> None:
        """Listen no longer; transfers under way end after their present bucket."""
        self._listening.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for connections
        self._listening.close()
        with self._lock:
            for part in (self._kept, self._newest, self._previous):
                if part is not None:
                    part.withdraw()

    def _part(self, tensors: Payload) -> _Part:
        assert isinstance(tensors, BucketedTensors), "it takes what its own `pack` made"
        self._num_parts += 1
        return _Part(self._num_parts, tensors.layout, tensors.buckets)

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:  # closed
                return
            if self._connections.acquire(blocking=False):
                threading.Thread(target=self._serve, args=(connection,), name="weights-send", daemon=True).start()
            else:
                connection.close()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                where = connection.getpeername()[0]
                connection.settimeout(HELLO_TIMEOUT_S)
                channel = Channel(connection)
                request = channel.challenge(self._token)
                if request is None:
                    logger.warning("%s asked for weights without the token of this run", where)
                elif self._places.acquire(timeout=QUEUE_TIMEOUT_S):
                    try:
                        self._send(channel, request)
                    finally:
                        self._places.release()
        except OSError as error:  # the actor died, hung or left; its pool sees to it
            logger.warning("a weight transfer ended early: %s", error)
        finally:
            self._connections.release()

    def _send(self, channel: Channel, request: Request) -> None:
        parts = self._parts(request)
        if parts is None:
            channel.say(Word.REPLACED)
            return
        meeting = open_rendezvous(self._host, 2, CONNECT_TIMEOUT_S)
        channel.say(Word.ADMITTED, meeting.port)
        channel.hear()  # READY: it has not died in the queue
        channel.connection.settimeout(self._stall_timeout_s)
        with Pair(meeting, SENDER, self._device, self._host, CONNECT_TIMEOUT_S) as pair:
            for part in parts:
                for index in range(len(part.offered.layout)):
                    bucket = part.bucket(index)
                    if bucket is None:
                        channel.say(Word.REPLACED)
                        return
                    channel.say(Word.BUCKET)
                    pair.send(bucket, self._stall_timeout_s)
            channel.say(Word.DONE)
            channel.hear()  # RECEIVED: closing the pair earlier could take the last bucket back

    def _parts(self, request: Request) -> list[_Part] | None:
        """What is asked for; None if it is not, or no longer, on offer."""
        with self._lock:
            if self._newest is None or request.changed != self._newest.offered.number:
                return None
            if request.kept == NO_PART:
                return [self._newest]
            if self._kept is None or request.kept != self._kept.offered.number:
                return None
            return [self._kept, self._newest]


class _Part:
    """Buckets that may be withdrawn while they are sent."""

    def __init__(self, number: int, layout: Layout, buckets: Sequence[torch.Tensor]) -> None:
        self.offered = OfferedPart(number, layout)
        self._buckets = tuple(buckets)

    def bucket(self, index: int) -> torch.Tensor | None:
        """None once they are withdrawn."""
        buckets = self._buckets
        return buckets[index] if buckets else None

    def withdraw(self) -> None:
        self._buckets = ()
