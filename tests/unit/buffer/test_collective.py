"""Checksums made where tensors are, tensors in buckets, and who may ask for them."""

from __future__ import annotations

import socket
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.collective.buckets import BucketedTensors, empty_bucket
from buffer.collective.checksum import CHUNK_BYTES, CHUNKS_AT_A_TIME, _weights, sums_of_chunks
from buffer.collective.control import Channel, Request, Word
from buffer.weights import (
    PayloadDigests,
    WeightManifest,
    WeightMismatchError,
    fingerprint,
    pack_tensors,
    unpack,
    verify_fingerprint,
)
from tests.unit.buffer.test_weights import state_dict

DTYPES = ("float32", "float16", "float64", "bfloat16", "int64", "int32", "uint8", "bool")
STRIDE_BYTES = CHUNKS_AT_A_TIME * CHUNK_BYTES


def sums_of(array: np.ndarray) -> bytes:
    (sums,) = sums_of_chunks([torch.from_numpy(array)])
    return sums


def random_bytes(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def publish(tensors, version=1):
    packed = BucketedTensors.copy_of(tensors.items(), bucket_bytes=64)
    digests = PayloadDigests.of(packed.entries, packed)
    manifest = WeightManifest(version, digests.fingerprint, packed.entries, (), (), checksum=digests.checksum)
    return packed, manifest


@pytest.mark.parametrize("size", [1, 3, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 5, STRIDE_BYTES + CHUNK_BYTES + 1])
def test_the_sums_are_those_of_the_definition(size: int) -> None:
    """Computed again with Python's integers, where it is not many."""
    data = random_bytes(size)
    padded = np.concatenate([data, np.zeros(-size % CHUNK_BYTES, np.uint8)])
    words = padded.view("<i4").reshape(-1, CHUNK_BYTES // 4)
    weights = _weights(torch.device("cpu")).numpy()
    assert (weights % 2 == 1).all()
    found = np.frombuffer(sums_of(data), "<i8")
    assert len(found) == len(words)
    for chunk in {0, len(words) // 2, len(words) - 1}:
        exact = sum(int(word) * int(weight) for word, weight in zip(words[chunk], weights, strict=True))
        assert int(found[chunk]) % 2**64 == exact % 2**64


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([7, CHUNK_BYTES, 2 * CHUNK_BYTES + 9]),
    st.floats(0.0, 1.0, exclude_max=True),
    st.integers(1, 255),
)
def test_a_change_of_one_byte_always_shows(size: int, where: float, flipped: int) -> None:
    data = random_bytes(size)
    before = sums_of(data)
    data[int(where * size)] ^= np.uint8(flipped)
    assert sums_of(data) != before


@pytest.mark.parametrize("size", [64, CHUNK_BYTES, 2 * CHUNK_BYTES, 4 * CHUNK_BYTES])
def test_exchanged_bytes_show(size: int) -> None:
    """Also where a sum that takes the position as the weight is blind: both halves have the same sum."""
    data = random_bytes(size)
    half = size // 2
    assert sums_of(np.concatenate([data[half:], data[:half]])) != sums_of(data)
    mirrored = np.concatenate([data[:half], data[:half].view("<i4")[::-1].copy().view(np.uint8)])
    assert sums_of(np.concatenate([mirrored[half:], mirrored[:half]])) != sums_of(mirrored)


def test_two_flipped_signs_show() -> None:
    """The top bit of a word of 64 bits, times the sum of two odd weights, would vanish modulo 2^64."""
    values = np.ones(CHUNK_BYTES // 4, np.float32)
    before = sums_of(values)
    for other in range(1, 200):
        changed = values.copy()
        changed[[0, other]] *= -1.0
        assert sums_of(changed) != before


def test_checksums_see_names_dtypes_and_shapes_and_not_the_order() -> None:
    base = publish({"a": torch.zeros(2, 3), "b": torch.ones(2, 3)})[1].checksum
    assert publish({"b": torch.ones(2, 3), "a": torch.zeros(2, 3)})[1].checksum == base
    assert publish({"a": torch.ones(2, 3), "b": torch.zeros(2, 3)})[1].checksum != base
    assert publish({"a": torch.zeros(3, 2), "b": torch.ones(2, 3)})[1].checksum != base
    assert publish({"a": torch.zeros(2, 3, dtype=torch.int32), "b": torch.ones(2, 3)})[1].checksum != base
    assert publish({"a": torch.zeros(2, 3)})[1].checksum != base


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_carried_exactly_and_checked(dtype: str) -> None:
    like = torch.from_numpy(random_bytes(24).copy())
    tensor = (like > 127) if dtype == "bool" else like.to(getattr(torch, dtype))
    # An odd number of bytes before it, where the type has them.
    packed, manifest = publish({"first": torch.ones(3, dtype=torch.uint8), "w": tensor.reshape(4, 6)})
    verify_fingerprint(packed, manifest)
    ((_, first), (_, found)) = unpack(packed, manifest)
    assert torch.equal(found, tensor.reshape(4, 6))
    assert found.dtype == tensor.dtype
    assert first.tolist() == [1, 1, 1]
    flat = packed["w"].view(torch.uint8).reshape(-1)
    flat[-1] ^= 1
    with pytest.raises(WeightMismatchError, match="version 1 have checksum"):
        verify_fingerprint(packed, manifest)


def test_buckets_are_a_snapshot_and_few() -> None:
    state = state_dict() | {"large": torch.arange(100.0), "transposed": torch.arange(6.0).reshape(2, 3).T}
    expected = {name: tensor.clone() for name, tensor in state.items()}
    packed, manifest = publish(state)
    for tensor in state.values():
        tensor.zero_()
    assert packed.keys() == expected.keys()
    assert all(torch.equal(packed[name], tensor) for name, tensor in expected.items())
    assert [[entry.name for entry in entries] for entries in packed.layout] == [
        ["embed.weight"],
        ["layer.weight", "layer.scale", "layer.mask", "empty"],
        ["large"],
        ["transposed"],
    ]
    sizes = [bucket.numel() for bucket in packed.buckets]
    assert sizes == [empty_bucket(entries, torch.device("cpu")).numel() for entries in packed.layout]
    assert all(tensor.untyped_storage().nbytes() in sizes for tensor in packed.values())
    verify_fingerprint(packed, manifest)


def test_the_fingerprint_does_not_depend_on_the_transport() -> None:
    packed, manifest = publish(state_dict())
    payload, entries = pack_tensors(state_dict().items())
    assert entries == packed.entries
    assert manifest.fingerprint == fingerprint(entries, payload)
    verify_fingerprint(payload, manifest)


def test_tensors_that_do_not_fit_the_manifest_are_refused() -> None:
    packed, manifest = publish(state_dict())
    with pytest.raises(WeightMismatchError, match=r"embed.weight .* shape \(4, 7\)"):
        verify_fingerprint(dict(packed) | {"embed.weight": torch.zeros(4, 7)}, manifest)
    with pytest.raises(WeightMismatchError, match=r"layer.weight .* arrived as float16"):
        verify_fingerprint(dict(packed) | {"layer.weight": torch.zeros(4, 4, dtype=torch.float16)}, manifest)
    with pytest.raises(WeightMismatchError, match="lack tensor empty"):
        unpack({name: tensor for name, tensor in packed.items() if name != "empty"}, manifest)
    with pytest.raises(WeightMismatchError, match="have checksum"):
        verify_fingerprint(packed, replace(manifest, checksum="other"))


def test_a_name_comes_once_and_has_a_type_that_travels() -> None:
    with pytest.raises(ValueError, match="tensor w came twice"):
        BucketedTensors.copy_of([("w", torch.ones(2)), ("w", torch.ones(2))])
    with pytest.raises(ValueError, match="tensor w is complex64"):
        BucketedTensors.copy_of([("w", torch.ones(2, dtype=torch.complex64))])


def test_only_who_knows_the_token_is_heard() -> None:
    for token, expected in ((b"t" * 32, Request(3, 4)), (b"s" * 32, None)):
        theirs, ours = (Channel(end) for end in socket.socketpair())
        for channel in (theirs, ours):
            channel.connection.settimeout(10.0)
        asking = threading.Thread(target=theirs.ask, args=(token, Request(3, 4)))
        asking.start()
        assert ours.challenge(b"t" * 32) == expected
        asking.join()
        ours.say(Word.ADMITTED, 65535)
        assert theirs.hear() == (Word.ADMITTED, 65535)
        ours.connection.sendall(b"\xff\0\0")
        with pytest.raises(ConnectionError, match="another protocol"):
            theirs.hear()
        ours.connection.close()
        with pytest.raises(ConnectionError, match="closed the connection"):
            theirs.hear()
        theirs.connection.close()
