"""The ranks of a learner: processes that take each optimizer step together, each on its part of the batch and with its
part of every weight, gradient and moment (FSDP2).

Rank 0 leads: it samples the data, decides whether to continue, publishes, logs and writes checkpoints. All ranks must
call *collectives* in the same order. If a rank fails, the others wait for it. So every wait has a timeout, and the
process that started the ranks ends all of them once one has failed.

What lies outside the decoder layers belongs to FSDP's root and stays gathered from the forward to the end of the
backward pass. Losses are normalized by global counts, so gradients are *summed* over the ranks, in float32.
"""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from learner.state_tree.policy import TreePolicy


class RankLostError(RuntimeError):
    """This rank has lost another one. The cause may be the error of another rank or the end of its process."""


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
        """Around collectives: with several ranks, RankLostError instead of an error of the process group. NCCL's errors
        have a type; gloo's are plain RuntimeErrors, as are some of torch's own."""
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
    """Open the store where `size` ranks find each other, in this process, at a free `port` of the address `host`."""
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


def join_ranks(rank: int, size: int, rendezvous: dist.TCPStore | tuple[str, int], timeout_s: float) -> Ranks:
    """Become one of `size` ranks; returns when all of them are there. Tensors in host memory travel by gloo, those of a
    GPU by NCCL.

    rendezvous: the store of `open_rendezvous` (rank 0), or its host and port (the others). timeout_s: longest wait for
    the others, here (RankLostError: not all came) and in every collective from now on.
    """
    timeout = timedelta(seconds=timeout_s)
    _keep_to_loopback(rendezvous[0] if isinstance(rendezvous, tuple) else rendezvous.host)
    try:
        store = dist.TCPStore(*rendezvous, size, is_master=False, timeout=timeout) if rank else rendezvous
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


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]  # torch appends a stack of C++ calls


def shard(policy: TreePolicy, ranks: Ranks) -> None:
    """Share the policy's weights among the ranks, in place; all ranks hold the same weights before. ValueError: the
    model is quantized, and cannot be cut."""
    if ranks.size == 1:
        return
    for name, parameter in policy.model.named_parameters():
        if not parameter.is_floating_point():
            raise ValueError(
                f"a quantized model cannot be shared among ranks ({name} is {parameter.dtype}): set "
                "learner.num_ranks=1, or train it without quantization"
            )
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (ranks.size,))
    precision = MixedPrecisionPolicy(param_dtype=policy.autocast_dtype, reduce_dtype=torch.float32)
    for layer in decoder_layers(policy.model):
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # a sum, not a mean ...
            module.set_force_sum_reduction_for_comms(True)  # ... in an operation that gloo has too
    register_fsdp_forward_method(policy, "gathered_sequence_logprobs")


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer's blocks: its longest list of modules, in every architecture of the library."""
    lists = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)


def synchronize_gradients(policy: TreePolicy, enabled: bool) -> None:
    """Whether the next backward pass sums gradients over the ranks; if not, each rank accumulates its own."""
    if isinstance(policy, FSDPModule):
        policy.set_requires_gradient_sync(enabled)


def clip_gradients(policy: TreePolicy, max_norm: float) -> Tensor:
    """Scale all gradients so that their common norm is at most `max_norm`; gives the norm before, at every rank."""
    return gathered(nn.utils.clip_grad_norm_(policy.parameters(), max_norm))


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor, at every rank (a collective call if it is sharded); without its gradient graph."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def all_finite(model: PreTrainedModel, ranks: Ranks) -> bool:
    """Whether every trained parameter is a finite number, at all ranks (a collective call)."""
    finite = True
    for parameter in model.parameters():
        if parameter.requires_grad:
            own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            finite = finite and bool(own.isfinite().all())
    return ranks.maximum(int(not finite)) == 0


def part_like(whole: Tensor, own: Tensor) -> Tensor:
    """This rank's part of `whole` (the same at every rank), as `own` is sharded; `whole` itself if it is not."""
    if not isinstance(own, DTensor) or whole.shape != own.shape:
        return whole
    return distribute_tensor(whole.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


@torch.no_grad()  # type: ignore[untyped-decorator]
def load_tensors(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Overwrite parameters and buffers with whole tensors of the same shape, by name; names that are absent stay."""
    for name, tensor in state.items():
        own[name].copy_(part_like(tensor, own[name]))


class OptimizerState(TypedDict):
    """What an optimizer's `state_dict` holds; parameters are numbered through the groups."""

    state: dict[int, dict[str, Tensor]]
    param_groups: list[dict[str, object]]


def whole_optimizer_state(optimizer: torch.optim.Optimizer, ranks: Ranks) -> OptimizerState:
    """The optimizer's `state_dict` as one rank alone would have it: whole tensors, in host memory if they were shared.
    All ranks call this together; it is for rank 0, the others get no tensors."""
    own: OptimizerState = optimizer.state_dict()
    if ranks.size == 1:
        return own
    whole: dict[int, dict[str, Tensor]] = {}
    for index, values in own["state"].items():
        for name, value in values.items():
            tensor = gathered(value)  # one at a time
            if ranks.leads:
                whole.setdefault(index, {})[name] = tensor.cpu()
    return OptimizerState(state=whole, param_groups=own["param_groups"])


def load_optimizer_state(optimizer: torch.optim.Optimizer, whole: OptimizerState) -> None:
    """Load what `whole_optimizer_state` gave at rank 0, and every rank has now; each keeps its part. Settings, as betas
    and weight decay, stay those that the optimizer was made with. ValueError: the state is that of other parameters."""
    own_groups: list[dict[str, object]] = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in own_groups] != [group["params"] for group in whole["param_groups"]]:
        raise ValueError("the optimizer's state in the checkpoint is not that of the parameters that are trained now")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {name: part_like(value, parameters[index]) for name, value in values.items()}
        for index, values in whole["state"].items()
    }
    optimizer.load_state_dict(OptimizerState(state=state, param_groups=own_groups))
