"""Products of states and the output embedding, chunk by chunk, in float32 or better; ids that are no actions."""

from __future__ import annotations

import torch
from torch import Tensor

from buffer.trajectory.schema import IdRanges

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


def fill_ids(values: Tensor, ranges: IdRanges, value: float, first_id: int = 0) -> None:
    """Set (in place) the columns of ids that no token has (`TokenContract.ids_without_token`).

    values: [..., W] whose columns are the ids from `first_id` on.
    """
    width = values.shape[-1]
    for begin, end in ranges:
        low, high = max(begin - first_id, 0), min(end - first_id, width)
        if low < high:
            values[..., low:high] = value
