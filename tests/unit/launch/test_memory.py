"""The memory of a plan: what its formulas count is what real models, optimizers and checkpoints hold."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from buffer.experts.tokenizer import character_tokenizer
from launch.cluster.memory import (
    CHUNK_LOGITS,
    CHUNK_TENSORS,
    GIB,
    KEPT_LOGITS,
    ModelSize,
    count_parameters,
    engine_terms,
    learner_terms,
    memory_lines,
    model_size,
)
from launch.settings.recipe import read_recipe
from launch.settings.run import RunSettings
from learner.checkpoints.checkpoint import TrainingState, take_snapshot
from learner.model.adapters import add_adapters
from learner.model.policy import load_policy
from learner.precision import hold_trained_parameters
from learner.settings.model import AdapterSettings
from learner.state_tree import vocabulary
from tests.checkpoints import progress_at

RECIPE = Path("launch/recipes/arithmetic_cpu.yaml")
PRETRAINED = Path("launch/recipes/text_lora_cpu.yaml")
SMALL = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2 = {"vocab_size": 50, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 30}


def make(kind: str, changes: dict[str, object]) -> PreTrainedModel:
    sizes = GPT2 if kind == "gpt2" else SMALL
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **changes}))


def described(model: PreTrainedModel, folder: Path) -> ModelSize:
    """The size by the config.json that transformers writes for the model."""
    model.config.save_pretrained(folder)
    size = count_parameters(json.loads((folder / "config.json").read_text()))
    assert size is not None
    return size


def in_all(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
        ("mistral", {"num_key_value_heads": 4}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
        ("qwen3", {"attention_bias": True}),
        ("gpt2", {}),
        ("gpt2", {"n_inner": 36}),
    ],
)
def test_parameters_are_those_of_the_model(kind: str, changes: dict[str, object], tied: bool, tmp_path: Path) -> None:
    model = make(kind, {**changes, "tie_word_embeddings": tied})
    assert described(model, tmp_path).total == in_all(model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_from_scratch_is_counted_without_its_tokenizer(kind: str, tied: bool) -> None:
    from buffer.experts.tasks import load_task

    changes = [f"model.architecture={kind}", f"model.tie_embeddings={tied}"]
    recipe = read_recipe(RECIPE, changes + (["model.num_key_value_heads=1"] if kind == "llama" else []))
    size = model_size(recipe)
    policy = load_policy(recipe.model, load_task(recipe.task, max_length=recipe.model.max_positions).tokenizer)
    assert size is not None
    assert size.total == in_all(policy.model)


def test_the_tokenizer_of_another_task_is_not_guessed() -> None:
    recipe = read_recipe(RECIPE)
    text = read_recipe(PRETRAINED).task
    assert model_size(recipe.model_copy(update={"task": text})) is None


def test_another_architecture_is_not_guessed() -> None:
    assert count_parameters({**SMALL, "model_type": "gpt_neox"}) is None
    assert count_parameters({}) is None


def lora(size: ModelSize, adapter: AdapterSettings | None, **learner: str) -> tuple[RunSettings, dict[str, float]]:
    """The recipe, and the bytes of every term of its learner."""
    recipe = read_recipe(PRETRAINED, [f"{key.replace('__', '.')}={value}" for key, value in learner.items()])
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"adapter": adapter})})
    of_each, of_first = learner_terms(recipe, size)
    return recipe, {term.label: term.size_bytes for term in (*of_each, *of_first)}


@pytest.mark.parametrize("train_unembedding", [False, True])
@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "down_proj"), ("c_proj",)])
@pytest.mark.parametrize("tied", [False, True])
def test_adapters_count_as_they_are_made(
    targets: tuple[str, ...], tied: bool, train_unembedding: bool, tmp_path: Path
) -> None:
    kind = "gpt2" if "c_proj" in targets else "llama"
    model = make(kind, {"tie_word_embeddings": tied})
    size = described(model, tmp_path)
    settings = AdapterSettings(rank=4, target_modules=targets, train_unembedding=train_unembedding)
    add_adapters(model, settings, base_name="base", revision=None, seed=0)
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    assert size.trained(settings) == sum(trained)
    _, terms = lora(size, settings)
    assert terms["frozen"] == 4 * (in_all(model) - sum(trained))


@pytest.mark.parametrize("has_adapter", [False, True])
@pytest.mark.parametrize(
    ("dtype", "param_dtype", "rounded_copy"),
    [("float32", "float32", 0), ("bfloat16", "float32", 2), ("bfloat16", "bfloat16", 0)],
)
def test_bytes_of_training_and_of_a_checkpoint_are_those_of_its_tensors(
    dtype: str, param_dtype: str, rounded_copy: int, has_adapter: bool, tmp_path: Path
) -> None:
    adapter = AdapterSettings(rank=4) if has_adapter else None
    model = make("llama", {"tie_word_embeddings": True})
    size = described(model, tmp_path)
    _, terms = lora(size, adapter, model__dtype=dtype, learner__param_dtype=param_dtype)

    model = model.to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    if adapter is not None:
        add_adapters(model, adapter, base_name="base", revision=None, seed=0)
    hold_trained_parameters(model, getattr(torch, param_dtype))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(parameters)
    optimizer.step()
    moments = [leaf for leaf in tree_leaves(optimizer.state_dict()) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    held = [*parameters, *(parameter.grad for parameter in parameters), *moments]
    count = sum(parameter.numel() for parameter in parameters)
    assert terms["trained"] == sum(tensor.nbytes for tensor in held) + rounded_copy * count
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    assert terms["frozen"] == sum(parameter.nbytes for parameter in frozen)

    tokenizer = character_tokenizer("abc")
    snapshot = take_snapshot(model, tokenizer, progress_at(1), TrainingState())
    copies = [*snapshot.tensors.values(), *snapshot.trained.values(), *snapshot.adapter.values(), *moments]
    assert terms["checkpoint"] == sum(tensor.nbytes for tensor in copies)


def test_ranks_share_what_is_trained_and_each_loads_all_of_it(tmp_path: Path) -> None:
    size = described(make("llama", {}), tmp_path)
    _, alone = lora(size, None)
    _, shared = lora(size, None, learner__num_ranks="4")
    assert shared["trained"] == alone["trained"] / 4
    assert shared["loading"] == 4 * size.total
    assert "loading" not in alone, "what is trained is what was loaded"


def test_a_frozen_copy_and_checkpointed_activations(tmp_path: Path) -> None:
    size = described(make("llama", {}), tmp_path)
    _, plain = lora(size, None)
    _, spared = lora(size, None, learner__activation_checkpointing="true")
    assert spared["activations"] == plain["activations"] / size.num_layers
    recipe = read_recipe(Path("launch/recipes/arithmetic_kl_control_cpu.yaml"))
    of_each, _ = learner_terms(recipe, size)
    assert {term.label: term.size_bytes for term in of_each}["base model"] == 4 * size.total


def test_an_engine_on_a_gpu_is_divided_and_keeps_no_second_layout(tmp_path: Path) -> None:
    size = described(make("llama", {}), tmp_path)
    recipe = read_recipe(PRETRAINED, ["actors.num_gpus=1", "actors.tensor_parallel_size=3", "actors.dtype=bfloat16"])
    weights, cache = engine_terms(recipe, size)
    assert (weights.size_bytes, weights.on_gpu) == (2 * size.total / 3, True)
    assert (cache.size_bytes, cache.on_gpu) == (0.5 * GIB, True)
    assert engine_terms(read_recipe(RECIPE), size)[0].size_bytes == 2 * 4 * size.total


def test_chunks_are_those_of_the_learner() -> None:
    known = (vocabulary.KEPT_ELEMENTS, vocabulary.CHUNK_ELEMENTS, vocabulary.TENSORS_PER_CHUNK)
    assert known == (KEPT_LOGITS, CHUNK_LOGITS, CHUNK_TENSORS)


@pytest.mark.parametrize("name", ["nobody/has-this-model", "/no/such/folder", "package:nothing/model.gguf"])
def test_a_model_that_is_not_at_hand_is_said_to_be_unknown(name: str) -> None:
    lines = memory_lines(read_recipe(PRETRAINED, [f"model.name={name}"]))
    assert "unknown until it is loaded" in lines[0]
    assert any("KV cache" in line for line in lines)


@pytest.mark.parametrize("text", ["{", '{"model_type": "llama"}'])
def test_a_broken_config_is_left_to_the_loading(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    assert model_size(read_recipe(PRETRAINED, [f"model.name={tmp_path}"])) is None


def test_lines_fit_a_terminal_and_add_up(tmp_path: Path) -> None:
    make("llama", {"num_attention_heads": 6, "num_key_value_heads": 6}).config.save_pretrained(tmp_path)
    changes = ["learner.num_ranks=2", "learner.num_gpus=1", "actors.num_gpus=1", "actors.count=4"]
    recipe = read_recipe(PRETRAINED, [f"model.name={tmp_path}", *changes])
    assert all(len(line) <= 78 for line in memory_lines(recipe))
    lines = memory_lines(read_recipe(RECIPE))
    amounts = [line.split(" x ") for line in lines if line[0] != " " and " x " in line]
    total = sum(int(count.split()[-1]) * float(gib) for count, gib in amounts)
    shown = next(float(line.split()[1]) for line in lines if line.startswith("all "))
    assert shown == pytest.approx(total + 0.5 + 1.0, abs=0.005 * (len(amounts) + 1))


def test_a_plan_beyond_this_machine_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    too_much = ["actors.count=100000"]
    is_small = psutil.virtual_memory().total < 4.8 * GIB
    assert ("WARNING" in memory_lines(read_recipe(RECIPE))[-1]) is is_small
    assert "WARNING" in memory_lines(read_recipe(RECIPE, too_much))[-1]
    on_cluster = memory_lines(read_recipe(RECIPE, [*too_much, "cluster.address=10.0.0.1:6379"]))
    assert on_cluster[-1].endswith("over the nodes of the cluster"), "nothing is known of its memory here"
