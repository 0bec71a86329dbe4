"""A tensor that an engine did not take is found by the probe, whatever kind it is, or lies below the engine's noise."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from actors.engine.interface import EngineSettings, Float32
from actors.engine.weights import NOISE_MARGIN, Proof, prove
from buffer.trajectory.schema import TokenContract
from buffer.weights import TensorEntry, WeightManifest, WeightMismatchError
from learner.publication import make_probe
from learner.state_tree.policy import sequence_logprobs
from tests.integration.engine_worker import fresh_engine, in_engine_process, small_engine
from tests.tiny_models import BACKSPACE_ID, EOS_ID, VOCAB_SIZE, perturbed, save_tiny_model, tiny_model

CONTRACT = TokenContract(vocab_size=VOCAB_SIZE, backspace_id=BACKSPACE_ID, eos_id=EOS_ID, tokenizer_hash="tiny")
PROBE = make_probe(CONTRACT, seed=0)
Tensors = dict[str, torch.Tensor]


def tiny_qwen() -> PreTrainedModel:
    """Two matrices of embeddings, and biases on queries, keys and values."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen2Config(vocab_size=VOCAB_SIZE, tie_word_embeddings=False, initializer_range=0.15, **sizes, **heads)
    model = Qwen2ForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


MODELS = {"qwen2, untied": tiny_qwen, "gpt2, tied": lambda: tiny_model("gpt2")}


def parameters(model: PreTrainedModel) -> Tensors:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def one_of_each_kind(model: PreTrainedModel) -> list[str]:
    """Names of the tensors outside the layers, and of those of the first layer."""
    return [name for name in parameters(model) if not re.search(r"\.[1-9]\d*\.", name)]


def probes(settings: EngineSettings, pairs: list[tuple[Tensors, Tensors]], names: list[str]) -> list[list[Float32]]:
    """For each pair: the engine's probes with the old weights, with the new ones, and with one old among the new."""
    engine = fresh_engine(settings)
    found = []
    for old, new in pairs:
        values = []
        for update in (old, new, *(new | {name: old[name]} for name in names)):
            engine.load_weights(update.items(), engine.version)
            values.append(engine.probe(PROBE))
        found.append(values)
    return found


def publication(logprobs: Float32, dtype: str) -> WeightManifest:
    return WeightManifest(0, "", (TensorEntry("w", dtype, ()),), PROBE, tuple(logprobs.tolist()))


def is_refused(manifest: WeightManifest, values: Float32, before: Proof, dtype: str) -> bool:
    try:
        prove(manifest, values, before, dtype)
    except WeightMismatchError:
        return True
    return False


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_tensor_is_missed_or_below_the_noise(kind: str, tmp_path: Path) -> None:
    """With an engine in float32 none is below it; in bfloat16 those that move the probe least are.

    The learner computes the probe in float32, with weights that are rounded where they are published in bfloat16.
    """
    first = MODELS[kind]()
    names = one_of_each_kind(first)
    folder = str(save_tiny_model(tmp_path, first))
    for engine_dtype, learner_dtypes in {"float32": ("float32", "bfloat16"), "bfloat16": ("bfloat16",)}.items():
        formats = [getattr(torch, name) for name in learner_dtypes]
        learners = [[m.to(each).float() for m in (MODELS[kind](), perturbed(first, seed=1))] for each in formats]
        pairs = [
            tuple({name: tensor.to(each) for name, tensor in parameters(m).items()} for m in models)
            for each, models in zip(formats, learners, strict=True)
        ]
        seen = in_engine_process(probes, small_engine(folder, dtype=engine_dtype), pairs, names)
        for (old, new), dtype, (at_old, at_new, *left_out) in zip(learners, learner_dtypes, seen, strict=True):
            expected = sequence_logprobs(new, PROBE)
            manifest = publication(expected, dtype)
            before = prove(publication(sequence_logprobs(old, PROBE), dtype), at_old, None, engine_dtype)
            assert not prove(manifest, at_new, before, engine_dtype).by_fingerprint_alone
            assert is_refused(manifest, at_old, before, engine_dtype), "an engine that took nothing"
            below_noise = {}
            for name, values in zip(names, left_out, strict=True):
                without = sequence_logprobs(new, PROBE, {name: parameters(old)[name]})
                effect = float(np.sqrt(np.mean((without - expected) ** 2)))
                if not is_refused(manifest, values, before, engine_dtype):
                    below_noise[name] = effect
            # An effect and the noise add up to at most their sum.
            limit = before.margin * (1 + 1 / NOISE_MARGIN * 2)
            assert all(effect < limit for effect in below_noise.values()), (dtype, engine_dtype, below_noise, limit)
            assert len(below_noise) <= (0 if engine_dtype == "float32" else len(names) // 2), below_noise
