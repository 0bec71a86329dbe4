"""Frozen linear layers in 4 bits (NF4 with doubly quantised scales: QLoRA, arXiv 2305.14314), through bitsandbytes.

The layers are quantised one by one after loading, whatever format the weights came in, and the model's config keeps
silent about it: what is published and saved are dequantised weights, so every reader sees an ordinary model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_LARGEST_RELATIVE_ERROR = 0.2
"""Of an NF4 round trip of normal numbers, as a share of their spread: it is about 0.09 where the library works."""


def quantise_linear_layers(model: PreTrainedModel) -> None:
    """Replace (in place) every linear layer but the output embedding by a frozen one in NF4. ValueError: the model has
    no such layers; else it raises as `check_available`."""
    check_available()
    from bitsandbytes.nn import Linear4bit, Params4bit

    head = model.get_output_embeddings()
    linear = [(name, layer) for name, layer in model.named_modules() if type(layer) is nn.Linear and layer is not head]
    if not linear:
        raise ValueError(
            f"quantization=nf4 has nothing to quantise: {type(model).__name__} is not made of plain linear layers; "
            "leave quantization out"
        )
    for name, layer in linear:
        weight = layer.weight
        quantised = Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=weight.dtype,
            quant_type="nf4",
            device="meta",
        )
        # Its fast path for CPUs packs the weight anew at the first forward pass without gradients, in a layout that is
        # rounded to bfloat16 and has no backward pass: training would go on with other weights.
        quantised.support_avx512bf16_for_cpu = False
        quantised.weight = Params4bit(
            weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=quantised
        )
        quantised.bias = layer.bias
        model.set_submodule(name, quantised.to(weight.device).train(layer.training))
    # By this name peft knows the layers for what they are.
    model.is_loaded_in_4bit = True


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is held in 4 bits."""
    return getattr(weight, "quant_state", None) is not None


def dequantise(weight: Tensor) -> Tensor:
    """A quantised weight as the layer multiplies with it; a new tensor."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


def check_available() -> None:
    """Quantise a small matrix and restore it. ValueError: bitsandbytes is not installed, or does not work here."""
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
