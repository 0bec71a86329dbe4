"""The weights of a model as every reader wants them: whole matrices under the names of the base model.

Engines, checkpoints and exports know neither adapters nor 4-bit layers nor shards. `publication_tensors` gives them one
plain tensor at a time: W + (alpha / rank) B A where a layer is adapted, W restored where it is quantised, gathered from
all ranks where it is sharded, rounded to what the model computes in where training holds it in float32. So no more than
one tensor exists beside the model, unless the reader keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from buffer.weights.low_rank import LowRankUpdate, merge_low_rank
from learner.model.adapters import ADAPTER_NAME, adapted_layers
from learner.model.quantization import dequantise, is_quantised
from learner.precision import published_dtype
from learner.ranks.sharding import gathered

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


def publication_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter and persistent buffer; of tied ones only the first.

    The names are those of the base model's `state_dict`. A tensor that is not adapted, quantised, sharded or rounded is
    the model's own memory: copy it before the next optimizer step.

    A sharded model (FSDP2) is gathered tensor by tensor, so all its ranks must iterate to the end, in step.
    """
    with torch.no_grad():
        for source in _sources(model):
            yield source.name, source.make()


def low_rank_updates(model: PreTrainedModel) -> tuple[LowRankUpdate, ...]:
    """What is to be merged when frozen and trained tensors travel apart."""
    return tuple(
        LowRankUpdate(
            source.name,
            *_factor_names(source),
            scaling=source.adapter.scaling[ADAPTER_NAME],
            transposed=source.adapter.fan_in_fan_out,
        )
        for source in _sources(model)
        if source.adapter is not None
    )


def frozen_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of what training does not change, without adapters: it has to travel once. All ranks iterate."""
    with torch.no_grad():
        for source in _sources(model):
            if not source.is_trained:
                yield source.name, source.base()


def trained_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of what training changes: A and B of each adapter, and other trained tensors. All ranks iterate.

    Whoever has these and the `frozen_tensors` merges them as `low_rank_updates` says.
    """
    with torch.no_grad():
        for source in _sources(model):
            if source.adapter is not None:
                yield from zip(_factor_names(source), _factors(source.adapter), strict=True)
            elif source.is_trained:
                yield source.name, source.base()


@dataclass(frozen=True)
class _Source:
    """One tensor to publish, not yet made. base: makes it without `adapter`. is_trained: itself, not by an adapter."""

    name: str
    base: Callable[[], Tensor]
    adapter: LoraLayer | None
    is_trained: bool

    def make(self) -> Tensor:
        return self.base() if self.adapter is None else merged(self.base(), self.adapter)


def _factor_names(source: _Source) -> tuple[str, str]:
    return f"{source.name}.lora_A", f"{source.name}.lora_B"


def _factors(adapter: LoraLayer) -> tuple[Tensor, Tensor]:
    a, b = adapter.lora_A[ADAPTER_NAME].weight, adapter.lora_B[ADAPTER_NAME].weight
    return gathered(a), gathered(b)


def _sources(model: PreTrainedModel) -> list[_Source]:
    sources: list[_Source] = []
    seen: set[Tensor] = set()  # by identity: tied parameters are one object
    for prefix, module, adapter in _plain_modules("", model, {layer for _, layer in adapted_layers(model)}):
        for name, tensor in _own_tensors(module):
            if tensor not in seen:
                seen.add(tensor)
                sources.append(_source(prefix + name, tensor, module, adapter, published_dtype(model, tensor)))
    return sources


def _plain_modules(
    prefix: str, module: nn.Module, adapted: set[LoraLayer]
) -> Iterator[tuple[str, nn.Module, LoraLayer | None]]:
    """(prefix of its names, module, the adapter around it) of every module of the base model."""
    if module in adapted:
        yield prefix, module.get_base_layer(), module
        return
    yield prefix, module, None
    for name, child in module.named_children():
        yield from _plain_modules(f"{prefix}{name}.", child, adapted)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of the module itself, children left out."""
    yield from module.named_parameters(recurse=False)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer


def _source(name: str, tensor: Tensor, module: nn.Module, adapter: LoraLayer | None, published: torch.dtype) -> _Source:
    is_weight = tensor is getattr(module, "weight", None)

    def base() -> Tensor:
        return dequantise(tensor) if is_weight and is_quantised(module) else gathered(tensor).to(published)

    return _Source(name, base, adapter if is_weight else None, tensor.requires_grad)


def merged(weight: Tensor, adapter: LoraLayer) -> Tensor:
    """W with the adapter's update, scaled by alpha / rank; a new tensor."""
    return merge_low_rank(weight, *_factors(adapter), adapter.scaling[ADAPTER_NAME], adapter.fan_in_fan_out)
