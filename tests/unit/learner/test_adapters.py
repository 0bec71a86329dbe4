"""Adapters: what is trained, what is published of them, and that a run goes on from what was saved."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from buffer.experts.tokenizer import character_tokenizer
from learner.checkpoints.checkpoint import ADAPTER_FOLDER, load_weights, take_snapshot
from learner.model.adapters import adapted_layers, adapter_tensors, add_adapters
from learner.model.policy import load_policy
from learner.publication import publication_tensors
from learner.settings.model import AdapterSettings, PretrainedModelSettings
from learner.state_tree.policy import TreePolicy
from tests.checkpoints import progress_at
from tests.tiny_models import BACKSPACE_ID, tiny_model
from tests.unit.learner.test_model import saved, word_tokenizer

RANK, ALPHA = 4, 8.0
PROBE = tuple(range(10, 26))
KINDS = [("llama", True), ("llama", False), ("gpt2", True)]


def adapted(kind="llama", *, tied=False, seed=0, **changes) -> PreTrainedModel:
    model = tiny_model(kind, tied=tied, seed=seed)
    settings = AdapterSettings(rank=RANK, alpha=ALPHA, **changes)
    add_adapters(model, settings, base_name="base", revision=None, seed=seed)
    return model


@torch.no_grad()
def train_a_little(model: PreTrainedModel, seed: int = 1) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([PROBE])).logits


def plain_model_of(tensors, model: PreTrainedModel) -> PreTrainedModel:
    """A model without adapters that holds the published tensors."""
    plain = type(model)(copy.deepcopy(model.config)).eval()
    missing, unexpected = plain.load_state_dict(dict(tensors), strict=False)
    assert not unexpected
    assert all("lm_head" in name for name in missing), missing
    return plain


@pytest.mark.parametrize(("kind", "tied"), KINDS)
def test_at_first_adapters_change_nothing_and_the_rest_is_frozen(kind, tied):
    base = tiny_model(kind, tied=tied)
    before = torch.get_rng_state()
    model = adapted(kind, tied=tied)
    assert type(model) is type(base)
    torch.testing.assert_close(logits(model), logits(base), atol=1e-6, rtol=0)
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trainable == {id(tensor) for tensor in adapter_tensors(model).values()}
    num_linear = {"llama": 7, "gpt2": 4}[kind] * 2
    assert len(list(adapted_layers(model))) == num_linear
    assert len(trainable) == 2 * num_linear + 1
    torch.set_rng_state(before)
    tiny_model(kind, tied=tied)
    after_a_model_alone = torch.get_rng_state()
    torch.set_rng_state(before)
    adapted(kind, tied=tied)
    assert torch.equal(torch.get_rng_state(), after_a_model_alone), "the global generator moved"


def test_the_unembedding_can_stay_frozen_and_tied():
    model = adapted(tied=True, train_unembedding=False)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not model.get_output_embeddings().weight.requires_grad
    assert model.config.tie_word_embeddings is True
    train_a_little(model)
    assert "lm_head.weight" not in dict(publication_tensors(model))
    torch.testing.assert_close(
        logits(plain_model_of(publication_tensors(model), model)), logits(model), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_layers_that_are_no_targets(target):
    with pytest.raises(ValueError, match=rf"target_modules names \S*{target}, which is no linear layer inside"):
        adapted(target_modules=("q_proj", target))
    with pytest.raises(ValueError, match="nothing_like_it"):
        adapted(target_modules=("nothing_like_it",))


def test_settings():
    with pytest.raises(ValidationError, match="target_modules is empty"):
        AdapterSettings(target_modules=())
    with pytest.raises(ValidationError, match="`all-linear` stands alone"):
        AdapterSettings(target_modules=("all-linear", "q_proj"))
    assert AdapterSettings(target_modules="q_proj").target_modules == ("q_proj",)
    with pytest.raises(ValidationError, match="quantization=nf4 freezes the linear layers"):
        PretrainedModelSettings(name="x", quantization="nf4")


@pytest.mark.parametrize(("kind", "tied"), KINDS)
def test_published_tensors_are_those_of_the_merged_model(kind, tied):
    model = train_a_little(adapted(kind, tied=tied))
    published = dict(publication_tensors(model))
    merged = plain_model_of(published.items(), model)
    assert logits(model).sub(logits(tiny_model(kind, tied=tied))).abs().max() > 0.1, "nothing was trained"
    logprobs, expected = (TreePolicy(m, BACKSPACE_ID).sequence_logprobs(PROBE) for m in (model, merged))
    assert abs(logprobs - expected).max() < 1e-5


def test_a_bfloat16_base_is_rounded_once():
    model = tiny_model().to(torch.bfloat16)
    add_adapters(model, AdapterSettings(rank=RANK, alpha=ALPHA), base_name="base", revision=None, seed=0)
    train_a_little(model)
    layer = model.model.layers[0].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.dtype == b.dtype == torch.float32
    exact = layer.base_layer.weight.double() + ALPHA / RANK * (b.double() @ a.double()).detach()
    published = dict(publication_tensors(model))["model.layers.0.mlp.up_proj.weight"]
    assert published.dtype == torch.bfloat16
    assert ((published.double() - exact).abs() <= 1.001 * 2**-8 * exact.abs()).all()


def test_merged_tensors_exist_one_at_a_time():
    """The iterator keeps none of what it made."""
    import weakref

    model = train_a_little(adapted())
    own = {id(parameter) for parameter in model.parameters()} | {p.data_ptr() for p in model.parameters()}
    made: list[weakref.ref[torch.Tensor]] = []
    for _, tensor in publication_tensors(model):
        assert sum(reference() is not None for reference in made) <= 1
        if tensor.data_ptr() not in own:
            made.append(weakref.ref(tensor))
        del tensor
    assert len(made) == 14


def test_tied_tensors_are_published_once():
    assert [name for name, _ in publication_tensors(tiny_model(tied=True))] == [
        name for name, _ in tiny_model(tied=True).named_parameters()
    ]
    names = [name for name, _ in publication_tensors(tiny_model(tied=False))]
    assert names[-1] == "lm_head.weight"


def write(folder: Path, model: PreTrainedModel) -> Path:
    folder.mkdir()
    take_snapshot(model, character_tokenizer("0123456789"), progress_at(7), {}).write(folder)
    return folder


@pytest.mark.parametrize(("kind", "tied"), KINDS)
def test_saved_adapters_go_on_where_they_were(tmp_path, kind, tied):
    model = train_a_little(adapted(kind, tied=tied))
    folder = write(tmp_path / "c", model)
    resumed = adapted(kind, tied=tied)
    parameters = list(resumed.parameters())
    load_weights(resumed, folder)
    assert all(a is b for a, b in zip(resumed.parameters(), parameters, strict=True))  # an optimizer holds them
    for name, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name

    plain = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-5, rtol=0)
    assert plain.config.tie_word_embeddings is False


def test_peft_loads_the_adapter_folder(tmp_path):
    base = tmp_path / "base"
    tiny_model(tied=True).save_pretrained(base)
    model = train_a_little(adapted(tied=True))
    folder = write(tmp_path / "c", model)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / ADAPTER_FOLDER)
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-6, rtol=0)


def test_what_does_not_fit_is_refused_before_anything_is_loaded(tmp_path):
    folder = write(tmp_path / "c", train_a_little(adapted()))
    full = write(tmp_path / "full", tiny_model())
    for target, source, message in (
        (adapted(), full, "has no adapters"),
        (adapted(seed=1), folder, "trained on another base model: model.embed_tokens.weight differs"),
        (adapted(target_modules=("q_proj",)), folder, "unexpected .*k_proj.lora_A"),
        (adapted(train_unembedding=False), folder, "unexpected .*lm_head"),
    ):
        before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            load_weights(target, source)
        assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


def test_a_policy_with_adapters(tmp_path):
    """Through the settings: a new backspace row is in the base, and in the trained unembedding."""
    name = saved(tmp_path / "base", word_tokenizer())
    settings = PretrainedModelSettings(name=name, dtype="float32", adapter=AdapterSettings(rank=2), seed=3)
    policy, again = load_policy(settings), load_policy(settings)
    assert type(policy.model) is LlamaForCausalLM
    assert policy.model.get_output_embeddings().weight.shape == (17, 16)
    assert policy.model.config.tie_word_embeddings is False
    for key, tensor in policy.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], tensor), key
    other = load_policy(settings.model_copy(update={"seed": 4})).model.state_dict()
    key = "model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert not torch.equal(other[key], policy.model.state_dict()[key])
    assert 16 in policy.model.generation_config.suppress_tokens
