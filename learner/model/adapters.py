"""Low-rank adapters (LoRA) on a frozen model, by peft, and the whole output embedding beside them.

peft replaces the adapted layers inside the model, which keeps its class and its names otherwise. A tied output
embedding is untied first: its copy is trained, while the input embedding stays frozen like the rest of the base.

The frozen linear layers may be held in 4 bits (NF4 with doubly quantized scales: QLoRA, arXiv 2305.14314), through
bitsandbytes. They are quantized one by one after loading, whatever format the weights came in, and the model's config
does not mention it: published and saved weights are dequantized, so readers get an ordinary model.
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

_LARGEST_RELATIVE_ERROR = 0.2
"""Error of an NF4 round trip of normal numbers, in standard deviations: about 0.09 if the library works."""


def add_adapters(
    model: PreTrainedModel, settings: AdapterSettings, base_name: str, revision: str | None, seed: int
) -> None:
    """Freeze `model` and add trainable adapters (in place), in float32; at first they change nothing, since B = 0.
    base_name, revision: where the base model came from, for `adapter_config.json`. seed: of A. ValueError where
    `target_modules` names no layer of the model, or one that has no plain matrix."""
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
    only, and tie them when they are resized."""
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


def quantize_linear_layers(model: PreTrainedModel) -> None:
    """Replace (in place) every linear layer but the output embedding by a frozen one in NF4. ValueError: the model has
    no such layers; else it raises as `check_available`."""
    check_available()
    from bitsandbytes.nn import Linear4bit, Params4bit

    head = model.get_output_embeddings()
    linear = [(name, layer) for name, layer in model.named_modules() if type(layer) is nn.Linear and layer is not head]
    if not linear:
        raise ValueError(
            f"quantization=nf4 has nothing to quantize: {type(model).__name__} is not made of plain linear layers; "
            "leave quantization out"
        )
    for name, layer in linear:
        weight = layer.weight
        quantized = Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=weight.dtype,
            quant_type="nf4",
            device="meta",
        )
        # Its fast path for CPUs packs the weight anew at the first forward pass without gradients, in a layout that is
        # rounded to bfloat16 and has no backward pass: training would go on with other weights.
        quantized.support_avx512bf16_for_cpu = False
        quantized.weight = Params4bit(
            weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=quantized
        )
        quantized.bias = layer.bias
        model.set_submodule(name, quantized.to(weight.device).train(layer.training))
    # By this name peft knows the layers for what they are.
    model.is_loaded_in_4bit = True


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is held in 4 bits."""
    return getattr(weight, "quant_state", None) is not None


def dequantize(weight: Tensor) -> Tensor:
    """A quantized weight as the layer multiplies with it; a new tensor."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


def check_available() -> None:
    """Quantize a small matrix and restore it. ValueError: bitsandbytes is not installed, or does not work here."""
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    except ImportError as error:
        raise ValueError(
            f"quantization=nf4 needs bitsandbytes, which cannot be imported ({error}): install the extra `qlora` of "
            "sequencematch, or leave quantization out"
        ) from None
    matrix = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    try:
        found = dequantize_4bit(*quantize_4bit(matrix, quant_type="nf4", compress_statistics=True))
    except RuntimeError as error:
        raise ValueError(f"quantization=nf4: bitsandbytes does not work on this machine ({error})") from error
    relative_error = float((found - matrix).square().mean().sqrt() / matrix.std())
    if not relative_error < _LARGEST_RELATIVE_ERROR:
        raise ValueError(
            f"quantization=nf4: bitsandbytes loses {relative_error:.0%} of a matrix on this machine; leave it out"
        )
