"""Processes that take weights as actors do, and stop or die in the middle of it when told."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from buffer.collective import receiver
from buffer.collective.handle import OfferedWeights
from buffer.weights import (
    TensorEntry,
    WeightManifest,
    WeightMismatchError,
    WeightsReplacedError,
    verify_fingerprint,
)

ANSWER_TIMEOUT_S = 120.0  # on a busy machine the imports of several processes take long


@dataclass(frozen=True)
class Order:
    """signal_at: (number of a bucket, signal that the taker sends itself before it takes that one)."""

    handle: OfferedWeights
    manifest: WeightManifest
    signal_at: tuple[int, int] | None = None


class Taker:
    """A process with a receiver of its own; a context manager."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self.process = context.Process(target=_be_taker, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def __enter__(self) -> Taker:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.join(ANSWER_TIMEOUT_S)

    def take(self, order: Order) -> None:
        """Begin; `answer` tells how it ended."""
        self._ours.send(order)

    def answer(self) -> tuple[int, str]:
        """Buckets that it received, and "right" or the error.

        Raises:
            EOFError: it died.
        """
        assert self._ours.poll(ANSWER_TIMEOUT_S), "the taker says nothing"
        answer: tuple[int, str] = self._ours.recv()
        return answer


def _be_taker(orders: Connection) -> None:
    torch.set_num_threads(1)
    taking = receiver.CollectiveReceiver()
    make = receiver.empty_bucket
    while True:
        order: Order = orders.recv()
        count = _Counter(make, order.signal_at)
        receiver.empty_bucket = count
        try:
            verify_fingerprint(taking.take(order.handle), order.manifest)
        except (ConnectionError, TimeoutError, WeightMismatchError, WeightsReplacedError) as error:
            orders.send((count.num_buckets, f"{type(error).__name__}: {error}"))
        else:
            orders.send((count.num_buckets, "right"))


class _Counter:
    def __init__(self, make: Callable[..., torch.Tensor], signal_at: tuple[int, int] | None) -> None:
        self.num_buckets = 0
        self._make = make
        self._signal_at = signal_at

    def __call__(self, entries: Sequence[TensorEntry], device: torch.device) -> torch.Tensor:
        if self._signal_at is not None and self.num_buckets == self._signal_at[0]:
            os.kill(os.getpid(), signal.Signals(self._signal_at[1]))
        self.num_buckets += 1
        return self._make(entries, device)
