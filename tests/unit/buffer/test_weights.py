"""Weight format: round trip, completeness and fingerprint."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.weights import (
    TensorEntry,
    WeightManifest,
    WeightMismatchError,
    fingerprint,
    pack_tensors,
    unpack,
    verify_fingerprint,
)


def state_dict():
    generator = torch.Generator().manual_seed(0)
    return {
        "embed.weight": torch.randn(7, 4, generator=generator),
        "layer.weight": torch.randn(4, 4, generator=generator).to(torch.bfloat16),
        "layer.scale": torch.tensor(0.5, dtype=torch.float16),
        "layer.mask": torch.tensor([True, False]),
        "empty": torch.empty(0, 3),
    }


def publish(state, version=1, probe=((), ())):
    payload, entries = pack_tensors(state.items())
    return payload, WeightManifest(version, fingerprint(entries, payload), entries, *probe)


def test_round_trip_is_exact_for_every_dtype():
    state = state_dict()
    payload, manifest = publish(state)
    assert [entry.name for entry in manifest.tensors] == list(state)
    verify_fingerprint(payload, manifest)
    for name, tensor in unpack(payload, manifest):
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name])


def test_tensors_made_on_the_fly_are_kept_apart():
    """Each is freed as soon as it is packed, so the next one may lie at the same address."""
    payload, _ = pack_tensors((str(i), torch.full((64, 64), float(i)).T[:, 1:]) for i in range(50))
    assert [float(array.mean()) for array in payload.values()] == list(range(50))


def test_a_name_comes_once():
    with pytest.raises(ValueError, match="tensor w came twice"):
        pack_tensors([("w", torch.ones(2)), ("w", torch.ones(2))])


def test_contiguous_tensors_are_views_and_others_are_copied_right():
    weight = torch.arange(6.0).reshape(2, 3)
    half = weight.to(torch.bfloat16)
    payload, entries = pack_tensors([("w", weight), ("t", weight.T), ("h", half)])
    assert payload["w"].ctypes.data == weight.data_ptr()
    assert payload["h"].ctypes.data == half.data_ptr()
    assert entries[1] == TensorEntry("t", "float32", (3, 2))
    np.testing.assert_array_equal(payload["t"], weight.T.numpy())
    assert payload["t"].flags.c_contiguous


def test_unpacked_tensors_are_views_of_the_payload():
    payload, manifest = publish(state_dict())
    for name, tensor in unpack(payload, manifest):
        if tensor.numel():
            assert tensor.data_ptr() == payload[name].ctypes.data, name


def test_read_only_arrays_load_without_a_warning():
    payload, manifest = publish(state_dict())
    for array in payload.values():
        array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(unpack(payload, manifest))) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("layer.weight"), "layer.weight arrived as nothing"),
        (lambda p: p.update(other=np.zeros(1)), "tensor other .* the manifest says nothing"),
        (lambda p: p.update({"embed.weight": np.zeros((4, 7), np.float32)}), r"embed.weight .*\(4, 7\)"),
        (lambda p: p.update({"layer.weight": np.zeros((4, 4), np.float16)}), "layer.weight .*float16"),
    ],
)
def test_incomplete_payload_is_refused_before_anything_is_loaded(change, message):
    payload, manifest = publish(state_dict())
    change(payload)
    with pytest.raises(WeightMismatchError, match=message):
        unpack(payload, manifest)  # not iterated
    with pytest.raises(WeightMismatchError, match=message):
        verify_fingerprint(payload, manifest)


@settings(deadline=None)
@given(st.data())
def test_fingerprint_sees_every_byte(data):
    payload, manifest = publish({name: tensor.clone() for name, tensor in state_dict().items()})
    name = data.draw(st.sampled_from([name for name, array in payload.items() if array.size]))
    view = payload[name].reshape(-1).view(np.uint8)
    view[data.draw(st.integers(0, len(view) - 1))] ^= np.uint8(1 << data.draw(st.integers(0, 7)))
    with pytest.raises(WeightMismatchError, match="version 1"):
        verify_fingerprint(payload, manifest)


def test_fingerprint_sees_names_dtypes_and_shapes_but_not_order():
    payload, entries = pack_tensors([("a", torch.zeros(2, 3)), ("b", torch.ones(2, 3))])
    base = fingerprint(entries, payload)
    assert fingerprint(entries[::-1], payload) == base
    swapped = {"a": payload["b"], "b": payload["a"]}
    assert fingerprint(entries, swapped) != base
    reshaped = (TensorEntry("a", "float32", (3, 2)), entries[1])
    assert fingerprint(reshaped, payload) != base
    retyped = (TensorEntry("a", "int32", (2, 3)), entries[1])
    assert fingerprint(retyped, payload) != base


def test_unsupported_dtype_names_the_tensor():
    with pytest.raises(ValueError, match="tensor w is complex64"):
        pack_tensors([("w", torch.zeros(1, dtype=torch.complex64))])


def test_manifest_refuses_nonsense():
    with pytest.raises(ValueError, match="negative"):
        WeightManifest(-1, "", (), (), ())
    with pytest.raises(ValueError, match="a probe of 3 tokens needs 2 log-probabilities, not 3"):
        WeightManifest(0, "", (), (1, 2, 3), (0.0, 0.0, 0.0))


def test_buffer_imports_no_heavy_library():
    code = (
        "import sys, buffer.weights, buffer.service.service\n"
        "print([name for name in ('torch', 'ray', 'vllm', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
