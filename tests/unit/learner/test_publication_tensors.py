"""Adapters that travel alone: merged by whoever takes them, to the same bits that the learner would have sent."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import PreTrainedModel

from buffer.weights import WeightManifest, WeightPayload, fingerprint, pack_tensors, unpack, verify_fingerprint
from learner.model.adapters import adapter_tensors, add_adapters
from learner.publication import frozen_tensors, low_rank_updates, publication_tensors, trained_tensors
from learner.settings.model import AdapterSettings
from tests.tiny_models import tiny_model
from tests.unit.learner.test_adapters import KINDS, adapted, train_a_little
from tests.unit.learner.test_quantization import needs_bitsandbytes, quantized


def copied(payload: WeightPayload) -> WeightPayload:
    """As a sender takes it: a snapshot."""
    return {name: array.copy() for name, array in payload.items()}


def manifest_of(payload: WeightPayload, entries, updates) -> WeightManifest:
    return WeightManifest(0, fingerprint(entries, payload), entries, (), (), updates)


def assert_arrives(model, kept, kept_entries, changed, changed_entries) -> None:
    payload = kept | changed
    manifest = manifest_of(payload, (*kept_entries, *changed_entries), low_rank_updates(model))
    verify_fingerprint(payload, manifest)
    arrived, expected = dict(unpack(payload, manifest)), dict(publication_tensors(model))
    assert arrived.keys() == expected.keys()
    for name, tensor in expected.items():
        assert arrived[name].dtype == tensor.dtype
        assert torch.equal(arrived[name], tensor), name


def in_bfloat16() -> PreTrainedModel:
    model = tiny_model().to(torch.bfloat16)
    add_adapters(model, AdapterSettings(rank=4, alpha=8.0), base_name="base", revision=None, seed=0)
    return model


@pytest.mark.parametrize(
    "make",
    [
        *(partial(adapted, kind, tied=tied) for kind, tied in KINDS),
        partial(adapted, tied=True, train_unembedding=False),
        in_bfloat16,  # merged weights are rounded as the learner rounds
        pytest.param(quantized, marks=needs_bitsandbytes),
    ],
)
def test_the_same_bits_arrive_each_time(make):
    model = train_a_little(make())
    kept, kept_entries = pack_tensors(frozen_tensors(model))
    kept = copied(kept)
    for _ in range(2):
        changed, changed_entries = pack_tensors(trained_tensors(model))
        assert_arrives(model, kept, kept_entries, copied(changed), changed_entries)
        train_a_little(model, seed=2)
    assert sum(array.nbytes for array in changed.values()) == sum(t.nbytes for t in adapter_tensors(model).values())
