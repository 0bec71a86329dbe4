"""A process group of two ranks, of their own: neither the learner's ranks nor an engine's are disturbed by it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from buffer.rendezvous import reason_of

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

SENDER, RECEIVER = 0, 1
Backend = Literal["gloo", "nccl"]

_environment = threading.Lock()


class PairLostError(ConnectionError):
    """The other end of a transfer died, hung or left."""


def backend_for(device: torch.device) -> Backend:
    """What carries tensors of that device."""
    return "nccl" if device.type == "cuda" else "gloo"


class Pair:
    """One end of a transfer; a context manager, which ends it. Used by one thread."""

    def __init__(
        self, store: dist.Store, rank: int, device: torch.device, address: str, connect_timeout_s: float
    ) -> None:
        """Returns when the other end is there.

        Args:
            rank: SENDER or RECEIVER.
            device: of the tensors that are sent or filled.
            address: of this process, for gloo to listen on; NCCL chooses among the interfaces of NCCL_SOCKET_IFNAME.

        Raises:
            PairLostError: it did not come in time.
        """
        self._other = 1 - rank
        self._device = device
        make = _gloo if backend_for(device) == "gloo" else _nccl
        with _pair_errors("did not connect"):
            self._group = make(store, rank, address, timedelta(seconds=connect_timeout_s))

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *error: object) -> None:
        with _pair_errors("did not close"):
            self._group.abort()

    def send(self, bucket: torch.Tensor, timeout_s: float) -> None:
        """Raises:
        PairLostError: the other end did not take [size] uint8 in time.
        """
        self._exchange(self._group.send, bucket, timeout_s)

    def receive(self, bucket: torch.Tensor, timeout_s: float) -> None:
        """Fill [size] uint8.

        Raises:
            PairLostError: it did not come in time.
        """
        self._exchange(self._group.recv, bucket, timeout_s)

    def _exchange(self, method: Callable[..., dist.Work], bucket: torch.Tensor, timeout_s: float) -> None:
        if bucket.numel() == 0:
            return
        with _pair_errors("stopped"), _own_stream(self._device):
            method([bucket], self._other, 0).wait(timedelta(seconds=timeout_s))


@contextmanager
def _pair_errors(what: str) -> Iterator[None]:
    """Errors of process groups are plain RuntimeErrors, or derived from them."""
    try:
        yield
    except RuntimeError as error:
        raise PairLostError(f"the other end of the weight transfer {what}: {reason_of(error)}") from error


def _gloo(store: dist.Store, rank: int, address: str, timeout: timedelta) -> dist.ProcessGroupGloo:
    import torch.distributed as dist

    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, 2, options)


def _nccl(store: dist.Store, rank: int, address: str, timeout: timedelta) -> dist.ProcessGroupNCCL:
    import torch.distributed as dist

    del address
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    name = "TORCH_NCCL_BLOCKING_WAIT"
    # Read by the constructor: without it a watchdog ends this process when the other one is lost.
    with _environment:
        before = os.environ.get(name)
        os.environ[name] = "1"
        try:
            return dist.ProcessGroupNCCL(store, rank, 2, options)
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def _own_stream(device: torch.device) -> AbstractContextManager[object]:
    """Waiting for a transfer holds up the stream in which one waits; the default one is where the learner trains."""
    import torch

    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))  # what made, or will reuse, the memory
    context: AbstractContextManager[object] = torch.cuda.stream(stream)
    return context
