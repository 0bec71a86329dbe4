"""Tensors in a few large pieces of memory: what is sent is a piece, what is read are the tensors in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from buffer.weights import TensorEntry, tensor_entry

if TYPE_CHECKING:
    import torch

BUCKET_BYTES = 64 * 2**20
"""A bucket holds as many tensors as fit, or one that is larger."""
ALIGNMENT_BYTES = 16

Layout = tuple[tuple[TensorEntry, ...], ...]
"""The tensors of each bucket, in their order."""


class BucketedTensors(dict[str, "torch.Tensor"]):
    """Tensors by name, each a view of one of `buckets` ([size] uint8)."""

    def __init__(self, layout: Layout, buckets: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.layout = layout
        self.buckets = tuple(buckets)
        for entries, bucket in zip(layout, self.buckets, strict=True):
            self.update(_views(entries, bucket))

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """Every tensor, in the order of the buckets."""
        return tuple(entry for entries in self.layout for entry in entries)

    @classmethod
    def copy_of(cls, tensors: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int = BUCKET_BYTES) -> BucketedTensors:
        """A snapshot, on the device of the tensors. Of those made on the fly one bucket's worth exists beside it.

        Raises:
            ValueError: a name comes twice, or a tensor has a dtype that the weight format does not carry.
        """
        layout: list[tuple[TensorEntry, ...]] = []
        buckets: list[torch.Tensor] = []
        waiting: list[tuple[TensorEntry, torch.Tensor]] = []
        seen: set[str] = set()
        size_bytes = 0
        for name, parameter in tensors:
            if name in seen:
                raise ValueError(f"tensor {name} came twice; every tensor is published under one name")
            seen.add(name)
            tensor = parameter.detach().contiguous()
            entry = tensor_entry(name, tensor)
            if waiting and size_bytes + tensor.nbytes > bucket_bytes:
                layout.append(tuple(each for each, _ in waiting))
                buckets.append(_joined([each for _, each in waiting]))
                waiting, size_bytes = [], 0
            waiting.append((entry, tensor))
            size_bytes += tensor.nbytes
        if waiting:
            layout.append(tuple(each for each, _ in waiting))
            buckets.append(_joined([each for _, each in waiting]))
        return cls(tuple(layout), buckets)


def empty_bucket(entries: Sequence[TensorEntry], device: torch.device) -> torch.Tensor:
    """[size] uint8, room for the tensors of one bucket."""
    import torch

    size_bytes = sum(_padded(_size_bytes(entry)) for entry in entries)
    return torch.empty(size_bytes, dtype=torch.uint8, device=device)


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    import torch

    parts: list[torch.Tensor] = []
    for tensor in tensors:
        flat = tensor.reshape(-1).view(torch.uint8)
        parts.append(flat)
        if padding := _padded(flat.numel()) - flat.numel():
            parts.append(torch.zeros(padding, dtype=torch.uint8, device=flat.device))
    return torch.cat(parts)


def _views(entries: Iterable[TensorEntry], bucket: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch

    found: dict[str, torch.Tensor] = {}
    start = 0
    for entry in entries:
        size_bytes = _size_bytes(entry)
        flat = bucket[start : start + size_bytes].view(getattr(torch, entry.dtype))
        found[entry.name] = flat.reshape(entry.shape)
        start += _padded(size_bytes)
    return found


def _size_bytes(entry: TensorEntry) -> int:
    import torch

    itemsize: int = getattr(torch, entry.dtype).itemsize
    return itemsize * math.prod(entry.shape)


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
