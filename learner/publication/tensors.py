"""The weights of a model as every reader wants them: whole matrices under the names of the base model.

Engines, checkpoints and exports know neither adapters nor 4-bit layers nor shards. They get one plain tensor at a time:
W + (alpha / rank) B A where a layer is adapted, W restored where it is quantised, gathered from all ranks where it is
sharded, rounded to what the model computes in where training holds it in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from buffer.weights import LowRankUpdate, merge_low_rank
from learner.model.adapters import ADAPTER_NAME, adapted_layers
from learner.model.quantization import dequantise, is_quantised
from learner.precision import published_dtype
from learner.ranks.sharding import gathered

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


def publication_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter and persistent buffer; of tied ones only the first.

    Names are those of the base model's `state_dict`. A tensor may be the model's own memory: copy it before the next
    optimizer step. All ranks of a sharded model must iterate to the end, in step.
    """
    with torch.no_grad():
        for source in _sources(model):
            yield source.name, source.merged()


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
            if not source.tensor.requires_grad:
                yield source.name, source.base()


def trained_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of what training changes: A and B of each adapter, other trained tensors. All ranks iterate."""
    with torch.no_grad():
        for source in _sources(model):
            if source.adapter is not None:
                yield from zip(_factor_names(source), _factors(source.adapter), strict=True)
            elif source.tensor.requires_grad:
                yield source.name, source.base()


@dataclass(frozen=True)
class _Source:
    """One tensor of the base model, not yet as it is published. adapter: what training adds to it, if anything."""

    name: str
    tensor: Tensor
    dtype: torch.dtype
    adapter: LoraLayer | None

    def base(self) -> Tensor:
        """Without the adapter."""
        return dequantise(self.tensor) if is_quantised(self.tensor) else gathered(self.tensor).to(self.dtype)

    def merged(self) -> Tensor:
        """W, or W + (alpha / rank) B A in a new tensor."""
        if self.adapter is None:
            return self.base()
        scaling, transposed = self.adapter.scaling[ADAPTER_NAME], self.adapter.fan_in_fan_out
        return merge_low_rank(self.base(), *_factors(self.adapter), scaling, transposed)


def _factor_names(source: _Source) -> tuple[str, str]:
    return f"{source.name}.lora_A", f"{source.name}.lora_B"


def _factors(adapter: LoraLayer) -> tuple[Tensor, Tensor]:
    a, b = adapter.lora_A[ADAPTER_NAME].weight, adapter.lora_B[ADAPTER_NAME].weight
    return gathered(a), gathered(b)


def _sources(model: PreTrainedModel) -> Iterator[_Source]:
    adapters = dict(adapted_layers(model))
    factors = {
        factor for layer in adapters.values() for part in (layer.lora_A, layer.lora_B) for factor in part.values()
    }
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):  # of tied ones the first
        path, _, own_name = name.rpartition(".")
        module = model.get_submodule(path)
        if module in factors or own_name in module._non_persistent_buffers_set:
            continue
        layer = path.removesuffix(".base_layer")  # where an adapter keeps what it adapts
        adapter = adapters.get(layer)
        yield _Source(
            name if adapter is None else f"{layer}.{own_name}",
            tensor,
            published_dtype(model, tensor),
            adapter if own_name == "weight" else None,
        )
