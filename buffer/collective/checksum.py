"""Checksums of tensors where they are: computed on the tensor's device, equal on every kind of device.

A tensor's bytes are cut into chunks of 2^14 words of 32 bits, the last one padded with zeros. A chunk's sum is that of
(word * weight of its position) modulo 2^64, the multilinear hash of Carter and Wegman (Universal classes of hash
functions, 1979) with fixed pseudo-random weights. They are odd, so that a single changed word always changes the sum;
any other change is missed with probability 2^-32 or less. Integers are added in whatever order, with the same result.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

WORDS_PER_CHUNK = 1 << 14
CHUNK_BYTES = 4 * WORDS_PER_CHUNK
CHUNKS_AT_A_TIME = 128
"""Bounds the products that exist at a time: 16 MiB, twice the bytes that they are of."""


def sums_of_chunks(tensors: Iterable[torch.Tensor]) -> list[bytes]:
    """For each contiguous tensor its chunks' sums, 8 bytes each; only the sums leave the device."""
    import torch

    sums = [_chunk_sums(tensor) for tensor in tensors]
    if not sums:
        return []
    together = torch.cat(sums).cpu().numpy()
    borders = np.cumsum([each.numel() for each in sums])[:-1]
    return [each.astype("<i8").tobytes() for each in np.split(together, borders)]


def _chunk_sums(tensor: torch.Tensor) -> torch.Tensor:
    """[number of chunks] int64, on the tensor's device."""
    import torch

    data = tensor.reshape(-1).view(torch.uint8)
    weights = _weights(data.device)
    sums = []
    num_whole = data.numel() // CHUNK_BYTES * CHUNK_BYTES
    for start in range(0, num_whole, CHUNKS_AT_A_TIME * CHUNK_BYTES):
        words = data[start : min(start + CHUNKS_AT_A_TIME * CHUNK_BYTES, num_whole)].view(torch.int32)
        sums.append((words.view(-1, WORDS_PER_CHUNK) * weights).sum(1))
    if num_whole < data.numel():
        last = torch.zeros(CHUNK_BYTES, dtype=torch.uint8, device=data.device)
        last[: data.numel() - num_whole] = data[num_whole:]
        sums.append((last.view(torch.int32) * weights).sum(0, keepdim=True))
    return torch.cat(sums) if sums else torch.zeros(0, dtype=torch.int64, device=data.device)


@cache
def _weights(device: torch.device) -> torch.Tensor:
    """[WORDS_PER_CHUNK] odd int64. Philox is a counter-based generator, the same on every machine."""
    import torch

    drawn = np.random.Philox(key=0).random_raw(WORDS_PER_CHUNK) | np.uint64(1)
    return torch.from_numpy(drawn.view(np.int64)).to(device)
