"""Writing safetensors one tensor at a time: the library reads the same back."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from buffer.weights.format import TensorEntry
from learner.checkpoints.safetensors_file import write_safetensors


def table_of(tensors: dict[str, torch.Tensor]) -> list[TensorEntry]:
    return [TensorEntry(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()]


TENSORS = {
    "odd": torch.tensor([True, False, True]),
    "half": torch.randn(3, 5).to(torch.bfloat16),
    "single": torch.randn(4, 3).T,
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.empty(0, 3),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "long": torch.arange(3),
    "int": torch.arange(3, dtype=torch.int32),
    "float16": torch.randn(2).to(torch.float16),
}


def test_what_is_written_is_read_back(tmp_path):
    file = tmp_path / "a.safetensors"
    write_safetensors(file, table_of(TENSORS), TENSORS.items())
    found = load_file(file)
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_the_tensors_must_be_those_of_the_table(tmp_path):
    file = tmp_path / "a.safetensors"
    table = table_of({"a": torch.ones(2), "b": torch.ones(3)})
    for tensors, message in (
        ([("a", torch.ones(2))], r"name='b'.* never came"),
        ([("b", torch.ones(3)), ("a", torch.ones(2))], r"got TensorEntry\(name='b'.* the table says .*name='a'"),
        ([("a", torch.ones(2).double()), ("b", torch.ones(3))], "got .*float64"),
        ([("a", torch.ones(2)), ("b", torch.ones(3)), ("c", torch.ones(1))], "name='c'.* the table says None"),
    ):
        with pytest.raises(ValueError, match=message):
            write_safetensors(file, table, tensors)
    with pytest.raises(ValueError, match="tensor a is complex64"):
        write_safetensors(file, [TensorEntry("a", "complex64", (1,))], [])
