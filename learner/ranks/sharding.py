"""Sharing the weights, gradients and optimizer state among the ranks (FSDP2): each holds its part of every tensor.

What lies outside the decoder layers belongs to the root and stays gathered from the forward to the end of the backward
pass. Losses are normalised by global counts, so gradients are *summed* over the ranks, in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from learner.ranks.group import Ranks
from learner.state_tree.policy import TreePolicy


def shard(policy: TreePolicy, ranks: Ranks) -> None:
    """Share the policy's weights among the ranks, in place; all ranks hold the same weights before. ValueError: the
    model is quantised, and cannot be cut."""
    if ranks.size == 1:
        return
    for name, parameter in policy.model.named_parameters():
        if not parameter.is_floating_point():
            raise ValueError(
                f"a quantised model cannot be shared among ranks ({name} is {parameter.dtype}): set "
                "learner.num_ranks=1, or train it without quantization"
            )
    mesh = ranks.mesh()
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


def synchronise_gradients(policy: TreePolicy, enabled: bool) -> None:
    """Whether the next backward pass sums gradients over the ranks; without, they pile up where they are."""
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
def overwrite_row(own: Tensor, index: int, row: Tensor) -> None:
    """Overwrite a row of a parameter, in place, with one that is the same at every rank."""
    whole = gathered(own)
    whole[index] = row.to(whole.dtype)
    if isinstance(own, DTensor):
        own.copy_(part_like(whole, own))


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

    All ranks call this together; it is for rank 0, the others get no tensors.
    """
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
