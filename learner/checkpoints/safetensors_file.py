"""Writing a `.safetensors` file one tensor at a time, from a table of what will come.

The library's own writer wants all tensors at once, which for a merged or gathered model is a second copy of it.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from buffer.weights.format import TensorEntry

_FORMAT_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "bool": "BOOL",
}
_HEADER_ALIGNMENT = 8


def write_safetensors(file: Path, table: Sequence[TensorEntry], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write `tensors` to `file` as they come; they must be those of `table`, in its order.

    Raises:
        ValueError: a tensor is not what the table says, or has a dtype that the file format lacks.
    """
    header, offsets = _layout(table)
    expected = iter(table)
    with file.open("wb") as output:
        output.write(len(header).to_bytes(8, "little") + header)
        start = output.tell()
        for name, tensor in tensors:
            entry = next(expected, None)
            found = entry_of(name, tensor)
            if found != entry:
                raise ValueError(f"writing {file}: got {found}, the table says {entry}")
            output.seek(start + offsets[name])
            output.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if (missing := next(expected, None)) is not None:
            raise ValueError(f"writing {file}: {missing} never came")


def entry_of(name: str, tensor: Tensor) -> TensorEntry:
    """What a table says of a tensor (of the whole of it, if it is sharded)."""
    return TensorEntry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def _layout(table: Sequence[TensorEntry]) -> tuple[bytes, dict[str, int]]:
    """The header, and where each tensor begins; wide numbers first, so that all are aligned in a mapped file."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for entry in sorted(table, key=lambda entry: -_item_bytes(entry)):
        begin, end = end, end + _item_bytes(entry) * math.prod(entry.shape)
        offsets[entry.name] = begin
        fields[entry.name] = {
            "dtype": _FORMAT_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    header = json.dumps(fields, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % _HEADER_ALIGNMENT), offsets


def _item_bytes(entry: TensorEntry) -> int:
    if entry.dtype not in _FORMAT_NAMES:
        raise ValueError(
            f"tensor {entry.name} is {entry.dtype}; a safetensors file takes {', '.join(sorted(_FORMAT_NAMES))}"
        )
    size_bytes: int = getattr(torch, entry.dtype).itemsize
    return size_bytes
