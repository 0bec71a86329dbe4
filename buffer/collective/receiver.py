"""An actor's end: it asks, and fills memory of its own device."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from buffer.collective.buckets import BucketedTensors, empty_bucket
from buffer.collective.control import NO_PART, Channel, Request, Word
from buffer.collective.handle import OfferedPart, OfferedWeights
from buffer.collective.pair import RECEIVER, Backend, Pair, PairLostError
from buffer.collective.sender import CONNECT_TIMEOUT_S, HELLO_TIMEOUT_S, QUEUE_TIMEOUT_S, STALL_TIMEOUT_S
from buffer.rendezvous import reason_of
from buffer.weights import TensorPayload, WeightsReplacedError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


class CollectiveReceiver:
    """Fetches publications, one at a time. What is kept stays in memory, and is fetched once."""

    def __init__(self, stall_timeout_s: float = STALL_TIMEOUT_S) -> None:
        self._stall_timeout_s = stall_timeout_s
        self._kept: tuple[bytes, BucketedTensors, int] | None = None

    def take(self, handle: OfferedWeights) -> TensorPayload:
        """See `WeightReceiver`.

        Raises:
            WeightsReplacedError: a newer publication is on offer. TimeoutError: the learner's node could not be reached
            in time. ConnectionError: the learner died, hung or left, or does not know the token.
            ValueError: the weights are on a GPU and this process has none.
        """
        device = _device_for(handle.backend)
        parts = self._missing(handle)
        kept_number = parts[0].number if len(parts) > 1 else NO_PART
        with _connect(handle) as channel:
            channel.connection.settimeout(HELLO_TIMEOUT_S)
            channel.ask(handle.token, Request(kept_number, handle.changed.number))
            channel.connection.settimeout(QUEUE_TIMEOUT_S)
            port = _expect(channel, Word.ADMITTED)
            channel.connection.settimeout(self._stall_timeout_s)
            received = self._receive(channel, handle, port, parts, device)
        if handle.kept is None:
            self._kept = None
            return received[-1]
        if len(parts) > 1:
            self._kept = (handle.token, received[0], handle.kept.number)
        assert self._kept is not None
        return self._kept[1] | received[-1]

    def _missing(self, handle: OfferedWeights) -> list[OfferedPart]:
        kept = handle.kept
        if kept is None or (self._kept is not None and (handle.token, kept.number) == (self._kept[0], self._kept[2])):
            return [handle.changed]
        return [kept, handle.changed]

    def _receive(
        self, channel: Channel, handle: OfferedWeights, port: int, parts: list[OfferedPart], device: torch.device
    ) -> list[BucketedTensors]:
        channel.say(Word.READY)
        own_address = channel.connection.getsockname()[0]  # of the interface that leads to the learner
        meeting = _join(handle.host, port)
        received = []
        with Pair(meeting, RECEIVER, device, own_address, CONNECT_TIMEOUT_S) as pair:
            for part in parts:
                buckets = []
                for entries in part.layout:
                    _expect(channel, Word.BUCKET)
                    bucket = empty_bucket(entries, device)
                    pair.receive(bucket, self._stall_timeout_s)
                    buckets.append(bucket)
                received.append(BucketedTensors(part.layout, buckets))
            _expect(channel, Word.DONE)
            channel.say(Word.RECEIVED)
        return received


def _device_for(backend: Backend) -> torch.device:
    import torch

    if backend == "gloo":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            "the learner's weights are on a GPU and this actor has none: give actors one each (actors.num_gpus) or set "
            "learner.transport=object_store"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _join(host: str, port: int) -> dist.TCPStore:
    import torch.distributed as dist

    try:
        return dist.TCPStore(host, port, 2, is_master=False, timeout=timedelta(seconds=CONNECT_TIMEOUT_S))
    except dist.DistError as error:
        raise PairLostError(f"its rendezvous at port {port} cannot be reached: {reason_of(error)}") from error


@contextmanager
def _connect(handle: OfferedWeights) -> Iterator[Channel]:
    where = f"the learner's weights at {handle.host}:{handle.port}"
    try:
        connection = socket.create_connection((handle.host, handle.port), CONNECT_TIMEOUT_S)
    except TimeoutError:
        raise TimeoutError(
            f"no connection within {CONNECT_TIMEOUT_S:.0f} s to {where}: let actors reach all ports of the learner's "
            "node, or set learner.transport=object_store"
        ) from None
    except OSError as error:
        raise ConnectionError(f"no connection to {where}: {error}") from error
    with connection:
        try:
            yield Channel(connection)
        except TimeoutError:
            raise TimeoutError(
                f"{where} did not come: the learner was silent for {connection.gettimeout():.0f} s"
            ) from None
        except ConnectionError as error:
            raise ConnectionError(f"{where} did not come: {error}") from error


def _expect(channel: Channel, expected: Word) -> int:
    """The port with it, if any."""
    word, port = channel.hear()
    if word == Word.REPLACED:
        raise WeightsReplacedError("these weights were replaced by newer ones")
    if word != expected:
        raise ConnectionError(f"it said {word.name} instead of {expected.name}")
    return port
