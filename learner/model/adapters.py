"""Low-rank adapters (LoRA) on a frozen model, by peft, and the whole output embedding beside them.

peft replaces the adapted layers inside the model, which keeps its class and its names otherwise. A tied output
embedding is untied first: its copy is trained, while the input embedding stays frozen like the rest of the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from learner.settings.model import ALL_LINEAR, AdapterSettings

if TYPE_CHECKING:  # peft takes seconds to import, and most runs train without it
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

ADAPTER_NAME = "default"

_PEFT_PREFIX = "base_model.model."
"""What peft's files put before the names of a model's own modules."""


def add_adapters(
    model: PreTrainedModel, settings: AdapterSettings, base_name: str, revision: str | None, seed: int
) -> None:
    """Freeze `model` and add trainable adapters (in place), in float32; at first they change nothing, since B = 0.

    base_name, revision: where the base model came from, for `adapter_config.json`. seed: of A.

    Raises:
        ValueError: `target_modules` names no layer of the model, or one that has no plain matrix.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    model.requires_grad_(False)
    if settings.train_unembedding:
        untie_unembedding(model)
    targets = settings.target_modules
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=ALL_LINEAR if targets == (ALL_LINEAR,) else list(targets),
        base_model_name_or_path=base_name,
        revision=revision,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in model.modules()),  # GPT-2 keeps [in, out]
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=ADAPTER_NAME)
    for name, layer in adapted_layers(model):
        if layer is model.get_output_embeddings() or not layer.lora_A:
            raise ValueError(
                f"target_modules names {name}, which is no linear layer inside the model; the output embedding is "
                "trained as a whole by train_unembedding"
            )
        for part in (layer.lora_A, layer.lora_B):
            part.float()  # a bfloat16 adapter would lose most updates of a small learning rate
    # Last, because peft freezes whatever is not its own.
    model.get_output_embeddings().weight.requires_grad_(settings.train_unembedding)


def untie_unembedding(model: PreTrainedModel) -> None:
    """Give the output embedding a matrix of its own (in place), if it shares the input embedding's."""
    head = model.get_output_embeddings()
    if head.weight is not model.get_input_embeddings().weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    declare_untied(model)


def declare_untied(model: PreTrainedModel) -> None:
    """Let transformers know (in place) that input and output embedding are two matrices: it would save one of them
    only, and tie them when they are resized.
    """
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def is_adapted(model: PreTrainedModel) -> bool:
    """Whether the model trains adapters on a frozen base."""
    return ADAPTER_NAME in getattr(model, "peft_config", {})


def adapted_layers(model: PreTrainedModel) -> Iterator[tuple[str, LoraLayer]]:
    """(name, layer) of every adapted layer; none in a model without adapters."""
    if not is_adapted(model):
        return
    from peft.tuners.lora import LoraLayer

    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            yield name, layer


def adapter_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """What training changes of an adapted model, under the names of peft's own files; the live parameters."""
    tensors: dict[str, Tensor] = {}
    for name, layer in adapted_layers(model):
        tensors[f"{_PEFT_PREFIX}{name}.lora_A.weight"] = layer.lora_A[ADAPTER_NAME].weight
        tensors[f"{_PEFT_PREFIX}{name}.lora_B.weight"] = layer.lora_B[ADAPTER_NAME].weight
    if unembedding := trained_unembedding(model):
        tensors[f"{_PEFT_PREFIX}{unembedding}.weight"] = model.get_output_embeddings().weight
    return tensors


def adapter_config(model: PreTrainedModel) -> LoraConfig:
    """peft's description of the adapters, as `PeftModel.from_pretrained` reads it."""
    name = trained_unembedding(model)
    return replace(model.peft_config[ADAPTER_NAME], modules_to_save=[name] if name else None, inference_mode=True)


def trained_unembedding(model: PreTrainedModel) -> str | None:
    """Name of the output embedding where it is trained as a whole, else None."""
    head = model.get_output_embeddings()
    if not head.weight.requires_grad:
        return None
    name: str = next(name for name, module in model.named_modules() if module is head)
    return name
