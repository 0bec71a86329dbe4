"""The ranks of a learner: processes that take one optimizer step together, each on its share of the batch.

Rank 0 leads: it draws the data, decides whether to go on, publishes, logs and writes checkpoints. What the ranks do
together (a *collective*) each of them must do in the same order. A rank that fails leaves the others waiting, so every
wait has a time-out, and whoever started the ranks ends all of them when one has failed.
"""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


class RankLostError(RuntimeError):
    """This rank could not go on with the others. Another one's error, or the end of its process, may say why."""


class Ranks:
    """This process among the ranks. Alone (`size` 1) there is no process group, and exchanges return what they get."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        """Alone, or (see `join_ranks`) in the process group that this process is already in."""
        assert size == 1 or dist.is_initialized()
        self.rank = rank
        self.size = size

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def mesh(self) -> DeviceMesh:
        """All ranks in one dimension, as FSDP wants them."""
        return init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (self.size,))

    def broadcast_numbers(self, numbers: Sequence[int]) -> list[int]:
        """The integers of rank 0 at every rank; the others give as many of any value."""
        return [int(number) for number in self.broadcast_bytes(torch.tensor(numbers, dtype=torch.int64))]

    def broadcast_bytes(self, payload: Tensor) -> Tensor:
        """[n] in host memory, of rank 0 at every rank; the others give a buffer of that size, which is filled."""
        if self.size > 1 and payload.numel():
            with self.exchange("data of rank 0"):
                dist.broadcast(payload, src=0)
        return payload

    def maximum(self, number: int) -> int:
        """The largest value over the ranks."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number, dtype=torch.int64)
        with self.exchange("a maximum"):
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def sum(self, numbers: Sequence[int]) -> list[int]:
        """Sums over the ranks, one for each number."""
        return [int(number) for number in self.sum_vector(torch.tensor(numbers, dtype=torch.int64))]

    def sum_vector(self, vector: Tensor) -> Tensor:
        """[n] in host memory: the sum over the ranks, which give as many numbers each."""
        if self.size > 1:
            with self.exchange("a sum"):
                dist.all_reduce(vector, dist.ReduceOp.SUM)
        return vector

    def gather_scalars(self, scalars: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The scalars of every rank, in the order of ranks, at every rank. All ranks give the same names."""
        if self.size == 1:
            return [dict(scalars)]
        names = sorted(scalars)
        mark = float(zlib.crc32("\n".join(names).encode()))  # below 2^32, so exact in float64
        mine = torch.tensor([mark, *(float(scalars[name]) for name in names)], dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        with self.exchange("metrics"):
            dist.all_gather(everyone, mine)
        assert all(float(values[0]) == mark for values in everyone), f"ranks have other metrics than {names}"
        return [
            {name: value.to(scalars[name].dtype) for name, value in zip(names, values[1:], strict=True)}
            for values in everyone
        ]

    @contextmanager
    def exchange(self, what: str) -> Iterator[None]:
        """Around collectives: with several ranks, RankLostError instead of an error of the process group.

        NCCL's errors have a type. gloo's are plain RuntimeErrors, as are some of torch's own.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not (isinstance(error, dist.DistError) or type(error) is RuntimeError):
                raise
            raise RankLostError(
                f"learner rank {self.rank} of {self.size} lost the other ranks during {what}, or failed in it: "
                f"{_first_line(error)}"
            ) from error


def open_rendezvous(host: str, size: int, timeout_s: float) -> dist.TCPStore:
    """Where `size` ranks find each other, held by this process; its `port` is a free one of the address `host`."""
    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    listening = socket.create_server((host, 0), family=family)  # left to itself, the store listens on every interface
    return dist.TCPStore(
        host,
        listening.getsockname()[1],
        size,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )


def join_ranks(rank: int, size: int, meeting: dist.TCPStore | tuple[str, int], timeout_s: float) -> Ranks:
    """Become one of `size` ranks; returns when all of them are there. Tensors in host memory travel by gloo, those of a
    GPU by NCCL.

    meeting: the store of `open_rendezvous` (rank 0), or its host and port (the others). timeout_s: longest wait for the
    others, here (RankLostError: not all came) and in every collective from now on.
    """
    timeout = timedelta(seconds=timeout_s)
    _keep_to_loopback(meeting[0] if isinstance(meeting, tuple) else meeting.host)
    try:
        store = dist.TCPStore(*meeting, size, is_master=False, timeout=timeout) if rank else meeting
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except dist.DistError as error:
        raise RankLostError(
            f"learner rank {rank} of {size} did not find the others within {timeout_s:.0f} s: {_first_line(error)}"
        ) from error
    return Ranks(rank, size)


def _keep_to_loopback(host: str) -> None:
    """Ranks that meet on loopback are on one machine; gloo would listen where the machine's name leads."""
    loopback = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}  # Linux, macOS
    if host == "127.0.0.1" and loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback.pop())


def leave_ranks() -> None:
    """Close this process's connections, so that ranks that still wait for it end with an error at once."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _first_line(error: BaseException) -> str:
    """Its message without the stack of C++ calls that torch appends."""
    return str(error).partition("\n")[0]
