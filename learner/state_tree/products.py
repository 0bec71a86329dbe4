"""Products of states and the output embedding, chunk by chunk, in float32 or better."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**22
"""Logits made at a time (16 MiB in float32)."""

VOCABULARY_CHUNK = 8192
"""Columns of the vocabulary in a chunk, at most."""


def accumulation_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    """In what products of the two are summed up: float32, or float64 if either is."""
    return torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)


def matmul_operand(a: Tensor, other: Tensor) -> Tensor:
    """`a` as `matmul` wants it: half precision stays where the device multiplies it into float32."""
    if a.is_cuda and a.dtype == other.dtype and a.dtype in (torch.bfloat16, torch.float16):
        return a
    return a.to(accumulation_dtype(a, other))


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """[m, n] product of two operands, in float32 or better."""
    if a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)
