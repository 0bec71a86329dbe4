"""The weights of a model as every reader wants them: whole matrices under the names of the base model.

Engines, checkpoints and exports know neither adapters nor 4-bit layers nor shards. `publication_tensors` gives them one
plain tensor at a time: W + (alpha / rank) B A where a layer is adapted, W restored where it is quantised, gathered from
all ranks where it is sharded. So no more than one tensor exists beside the model, unless the reader keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from buffer.weights import TensorEntry
from learner.adapters import ADAPTER_NAME, adapted_layers
from learner.quantization import dequantise, is_quantised, original_format
from learner.sharding import gathered

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


def publication_table(model: PreTrainedModel) -> tuple[TensorEntry, ...]:
    """Name, dtype and (whole) shape of what `publication_tensors` gives, in its order; nothing is computed."""
    return tuple(source.entry for source in _sources(model))


def publication_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter and persistent buffer; of tied ones only the first.

    The names are those of the base model's `state_dict`. A tensor that is not adapted, quantised or sharded is the
    model's own memory: copy it before the next optimizer step.

    A sharded model (FSDP2) is gathered tensor by tensor, so all its ranks must iterate to the end, in step.
    """
    with torch.no_grad():
        for source in _sources(model):
            yield source.entry.name, source.make()


@dataclass(frozen=True)
class _Source:
    """One tensor to publish, not yet made."""

    entry: TensorEntry
    make: Callable[[], Tensor]


def _sources(model: PreTrainedModel) -> list[_Source]:
    sources: list[_Source] = []
    seen: set[Tensor] = set()  # by identity: tied parameters are one object
    for prefix, module, adapter in _plain_modules("", model, {layer for _, layer in adapted_layers(model)}):
        for name, tensor in _own_tensors(module):
            if tensor not in seen:
                seen.add(tensor)
                sources.append(_source(prefix + name, tensor, module, adapter))
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


def _source(name: str, tensor: Tensor, module: nn.Module, adapter: LoraLayer | None) -> _Source:
    is_weight = tensor is getattr(module, "weight", None)
    quantised = is_weight and is_quantised(module)
    dtype, shape = original_format(tensor) if quantised else (tensor.dtype, tensor.shape)
    entry = TensorEntry(name, str(dtype).removeprefix("torch."), tuple(shape))

    def base() -> Tensor:
        return dequantise(tensor) if quantised else gathered(tensor)

    if adapter is None or not is_weight:
        return _Source(entry, base)
    return _Source(entry, lambda: merged(base(), adapter))


def merged(weight: Tensor, adapter: LoraLayer) -> Tensor:
    """W + (alpha / rank) B A, added in the adapter's format and rounded once to that of W; a new tensor."""
    a, b = gathered(adapter.lora_A[ADAPTER_NAME].weight), gathered(adapter.lora_B[ADAPTER_NAME].weight)
    update = (b @ a) * adapter.scaling[ADAPTER_NAME]
    if adapter.fan_in_fan_out:
        update = update.T
    return (weight.to(update.dtype) + update).to(weight.dtype)
