"""Frozen layers in 4 bits: trained on by adapters, published as ordinary weights, refused where they cannot be had."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from learner.checkpoints.checkpoint import load_weights, read_training_state
from learner.model.adapters import adapted_layers, adapter_tensors, add_adapters, is_quantized, quantize_linear_layers
from learner.model.policy import load_policy
from learner.publication import publication_tensors
from learner.settings.model import AdapterSettings, PretrainedModelSettings
from tests.checkpoints import progress_at, save_checkpoint
from tests.tiny_models import tiny_model
from tests.training import (
    MATCHING,
    HandMadeRollouts,
    assert_bit_identical,
    make_stage,
    make_stream,
    make_trainer,
    train,
    weights_of,
)
from tests.unit.learner.test_adapters import PROBE, logits, plain_model_of, train_a_little, write
from tests.unit.learner.test_model import saved, word_tokenizer

needs_bitsandbytes = pytest.mark.skipif(
    not importlib.util.find_spec("bitsandbytes"), reason="the extra `qlora` (bitsandbytes) is not installed"
)


def quantized(*targets: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = tiny_model(tied=True).to(dtype)
    quantize_linear_layers(model)
    settings = AdapterSettings(rank=4, alpha=8.0, target_modules=targets or ("all-linear",))
    add_adapters(model, settings, base_name="base", revision=None, seed=0)
    return model


@needs_bitsandbytes
def test_layers_are_held_in_four_bits():
    base, model = tiny_model(tied=True), quantized()
    layers = [layer.get_base_layer() for _, layer in adapted_layers(model)]
    assert len(layers) == 14
    assert all(is_quantized(layer.weight) for layer in layers)
    assert not is_quantized(model.get_output_embeddings().weight)
    packed_bytes = sum(layer.weight.numel() for layer in layers)
    assert packed_bytes == sum(p.numel() for n, p in base.named_parameters() if n.endswith("proj.weight")) // 2
    published = dict(publication_tensors(model))  # adapters do nothing yet
    for name, weight in base.state_dict().items():
        error = float((published[name] - weight).square().mean().sqrt() / weight.std()) if weight.dim() > 1 else 0.0
        assert 0.05 < error < 0.15 if name.endswith("proj.weight") else error == 0.0, name


@needs_bitsandbytes
@pytest.mark.parametrize("targets", [(), ("q_proj",)])
def test_published_tensors_are_those_that_the_model_computes_with(targets):
    """Layers that are quantized and not adapted included."""
    model = train_a_little(quantized(*targets))
    base = tiny_model(tied=True)
    published = dict(publication_tensors(model))
    assert set(published) == {*base.state_dict(), "lm_head.weight"}
    for name, tensor in published.items():
        assert tensor.shape == base.state_dict()[name].shape
        assert tensor.dtype == torch.float32
    torch.testing.assert_close(logits(plain_model_of(published.items(), model)), logits(model), atol=2e-5, rtol=0)


@needs_bitsandbytes
def test_a_look_without_gradients_does_not_change_the_layers():
    """bitsandbytes repacks weights for CPUs on the first such pass, with rounding and without a backward pass."""
    model = quantized()
    before = model(torch.tensor([PROBE])).logits.detach()
    packed = {name: layer.get_base_layer().weight.clone() for name, layer in adapted_layers(model)}
    torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=0)
    for name, layer in adapted_layers(model):
        assert torch.equal(layer.get_base_layer().weight, packed[name]), name
    model(torch.tensor([PROBE])).logits.logsumexp(-1).sum().backward()
    assert all(tensor.grad is not None for tensor in adapter_tensors(model).values())


@needs_bitsandbytes
def test_a_saved_model_is_an_ordinary_one_and_training_goes_on_from_it(tmp_path):
    model = train_a_little(quantized())
    folder = write(tmp_path / "c", model)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(plain.config, "quantization_config")
    torch.testing.assert_close(logits(plain), logits(model), atol=2e-5, rtol=0)
    resumed = quantized()
    load_weights(resumed, folder)
    torch.testing.assert_close(logits(resumed), logits(model), atol=1e-6, rtol=0)


@needs_bitsandbytes
def test_stopping_and_going_on_changes_nothing(task, tmp_path):
    steps, stop_at = 6, 4
    stage = make_stage(MATCHING, steps)
    straight, first, second = (quantized() for _ in range(3))
    expected = [row["loss"] for row in train(make_trainer(task, straight, stage), steps)]
    stream = make_stream(task)
    trainer = make_trainer(task, first, stage, stream)
    losses = [row["loss"] for row in train(trainer, stop_at)]
    path = save_checkpoint(tmp_path, first, task.tokenizer, progress_at(stop_at), trainer.state())
    rollouts = HandMadeRollouts(task, next_row=stop_at * stage.rollout_batch_size)
    trainer = make_trainer(task, second, stage, stream, rollouts)
    load_weights(second, path)
    trainer.load_state(read_training_state(path))
    losses += [row["loss"] for row in train(trainer, steps - stop_at)]
    assert losses == expected
    assert losses[-1] != losses[0]
    assert_bit_identical(weights_of(second), weights_of(straight))


@needs_bitsandbytes
def test_a_policy_in_four_bits(tmp_path):
    name = saved(tmp_path, word_tokenizer())
    settings = PretrainedModelSettings(name=name, dtype="float32", adapter=AdapterSettings(rank=2), quantization="nf4")
    policy = load_policy(settings)
    assert all(is_quantized(layer.get_base_layer().weight) for _, layer in adapted_layers(policy.model))


@needs_bitsandbytes
def test_models_without_plain_linear_layers_are_refused():
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not made of plain linear layers"):
        quantize_linear_layers(tiny_model("gpt2"))


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes, .* install the extra `qlora`"):
        quantize_linear_layers(tiny_model())


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            lambda *_: (_ for _ in ()).throw(RuntimeError("no kernel image")),
            r"does not work on this machine \(no kernel",
        ),
        (lambda *_: torch.zeros(64, 64), "loses 100% of a matrix"),
    ],
)
def test_a_machine_on_which_the_library_does_not_work(monkeypatch, broken, message):
    import bitsandbytes.functional

    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", broken)
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        quantize_linear_layers(model)
    assert not any(is_quantized(parameter) for parameter in model.parameters())
