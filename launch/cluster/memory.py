"""Memory of each process of a run by formula, from the settings and the model's config, before anything is loaded.

All are estimates: docs/guide.md compares them with measurements, from which the constants are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from buffer.experts.arithmetic import ALPHABET
from buffer.settings import ArithmeticTaskSettings
from launch.settings.run import RunSettings, needs_actors
from learner.settings.model import ALL_LINEAR, AdapterSettings, ScratchModelSettings

GIB = 2**30
DRIVER_GIB, LEARNER_GIB, ENGINE_GIB, SERVICE_GIB, RAY_GIB = 0.7, 0.7, 1.2, 0.2, 0.5
"""Resident in a process without a model. Service: the actor pool, or a shard. Ray: all that it starts for a run."""
CPU_COPIES = 2  # of the weights in an engine on CPU, whose kernels want them in another layout
KEPT_LOGITS, CHUNK_LOGITS, CHUNK_TENSORS = 2**25, 2**22, 4  # as in learner.state_tree.vocabulary, which imports torch
BYTES, NF4_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}, 0.52
ROW_BYTES, ACTION_BYTES = 300, 20
GATED = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class ModelSize:
    """total: parameters. embedding: those of one embedding. linear: (name, inputs, outputs) of the products of a layer.
    kept: numbers that a layer keeps of each token for the backward pass (an estimate)."""

    total: int
    vocab: int
    embedding: int
    is_tied: bool
    num_layers: int
    kept: int
    linear: tuple[tuple[str, int, int], ...]

    def trained(self, adapter: AdapterSettings | None) -> int:
        """Parameters that training changes."""
        if adapter is None:
            return self.total
        widths = sum(i + o for name, i, o in self.linear if {ALL_LINEAR, name} & {*adapter.target_modules})
        return self.num_layers * adapter.rank * widths + self.embedding * adapter.train_unembedding


def model_size(settings: RunSettings) -> ModelSize | None:
    """The size of the run's model; None where its config is not on this machine, or is not counted here."""
    model = settings.model
    if isinstance(model, ScratchModelSettings):
        if not isinstance(settings.task, ArithmeticTaskSettings):
            return None
        sizes = {"hidden_size": model.hidden_size, "n_positions": model.max_positions, "model_type": model.architecture}
        sizes |= {"num_hidden_layers": model.num_layers, "num_attention_heads": model.num_heads}
        vocab = len(ALPHABET) + 4  # the task's tokenizer: padding, <bos>, <eos>, <backspace>
        return count_parameters(
            {**model.model_dump(), **sizes, "vocab_size": vocab, "tie_word_embeddings": model.tie_embeddings}
        )
    path: object = Path(model.name) / "config.json"
    if not Path(model.name).is_dir():
        from huggingface_hub import errors, try_to_load_from_cache

        with suppress(errors.HFValidationError):  # a file of a package, or a folder that is not there
            path = try_to_load_from_cache(model.name, "config.json", revision=model.revision)
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return None
    with suppress(KeyError, ValueError):  # loading says what is wrong with it
        return count_parameters(json.loads(Path(path).read_text(encoding="utf-8")))
    return None


def count_parameters(config: Mapping[str, Any]) -> ModelSize | None:
    """The size of the model that a config.json describes; None for an architecture that is not counted here."""
    kind = config.get("model_type")
    if kind not in (*GATED, "gpt2"):
        return None
    hidden, layers = config.get("n_embd") or config["hidden_size"], config.get("n_layer") or config["num_hidden_layers"]
    if kind == "gpt2":
        inner = config.get("n_inner") or config.get("intermediate_size") or 4 * hidden
        linear = [("c_attn", hidden, 3 * hidden), ("c_proj", hidden, hidden)]
        linear += [("c_fc", hidden, inner), ("c_proj", inner, hidden)]
        more, ends = sum(outputs for *_, outputs in linear) + 4 * hidden, (2 + config["n_positions"]) * hidden
    else:
        inner, heads = config["intermediate_size"], config["num_attention_heads"]
        width = config.get("head_dim") or hidden // heads
        q, kv = heads * width, (config.get("num_key_value_heads") or heads) * width
        linear = [("q_proj", hidden, q), ("k_proj", hidden, kv), ("v_proj", hidden, kv), ("o_proj", q, hidden)]
        linear += [("gate_proj", hidden, inner), ("up_proj", hidden, inner), ("down_proj", inner, hidden)]
        in_attention, in_mlp = config.get("attention_bias", kind == "qwen2"), config.get("mlp_bias", False)
        more, ends = 2 * hidden + 2 * width * (kind == "qwen3"), hidden
        more += in_attention * (q + 2 * kv + hidden * (kind != "qwen2")) + in_mlp * (2 * inner + hidden)
    is_tied, embedding = config.get("tie_word_embeddings", kind == "gpt2"), config["vocab_size"] * hidden
    total = layers * (more + sum(i * o for _, i, o in linear)) + ends + (1 if is_tied else 2) * embedding
    return ModelSize(total, config["vocab_size"], embedding, is_tied, layers, 8 * hidden + 4 * inner, tuple(linear))


class Term(NamedTuple):
    """A part of the memory of a process. on_gpu: it lies there."""

    label: str
    size_bytes: float
    formula: str
    on_gpu: bool = False


LOADING = "loading"
"""Label of what is gone before the rest is there."""


def learner_terms(settings: RunSettings, size: ModelSize) -> tuple[list[Term], list[Term]]:
    """Of every rank, and of rank 0 alone, which copies weights and moments for checkpoints and pushes."""
    learner, model, ranks = settings.learner, settings.model, settings.learner.num_ranks
    on_gpu, adapter = learner.num_gpus > 0, getattr(model, "adapter", None)
    computed, held, trained = BYTES[model.dtype], BYTES[learner.param_dtype], size.trained(adapter)
    each, is_copied = 4 * held + computed * (held > computed), adapter is not None or held > computed
    unembedding = size.embedding if adapter is not None and adapter.train_unembedding else 0
    published = size.total + unembedding * size.is_tied
    frozen = 0 if adapter is None else published - unembedding
    in_4_bits = size.num_layers * sum(i * o for _, i, o in size.linear) if getattr(model, "quantization", None) else 0
    frozen_bytes = frozen * computed - in_4_bits * (computed - NF4_BYTES)
    base = (frozen_bytes + trained * held) * any(stage.objective.needs_base_model for stage in settings.stages)
    tokens, loaded = learner.max_tokens_per_micro_batch, held if adapter is None else computed
    kept = computed * size.kept * (1 if learner.activation_checkpointing else size.num_layers)
    logits = min(tokens * size.vocab, KEPT_LOGITS) + CHUNK_TENSORS * min(tokens * size.vocab, CHUNK_LOGITS)
    terms = [
        Term("trained", trained * each / ranks, f"{_count(trained)} x {each:g} B / {ranks}", on_gpu),
        Term(
            "frozen", frozen_bytes / ranks, f"{_count(frozen)} x {frozen_bytes / (frozen or 1):.2g} B / {ranks}", on_gpu
        ),
        Term("base model", base / ranks, "frozen copy of the policy at the start of a stage", on_gpu),
        Term("activations", tokens * kept, f"at most {tokens:,} tokens x about {kept / 1024:,.0f} KiB", on_gpu),
        Term("logits", 4 * logits, "tokens x vocabulary, in chunks", on_gpu),
    ]
    if ranks > 1 or on_gpu or in_4_bits:
        terms.append(
            Term(LOADING, size.total * loaded, f"{_count(size.total)} x {loaded:g} B, all of it, before the rest")
        )
    copies = published * computed + trained * (2 + is_copied) * held
    push = Term("push", published * computed * is_copied, f"{_count(published)} x {computed:g} B, by rank 0")
    return terms, [Term("checkpoint", copies, "weights and moments, copied by rank 0"), push]


def engine_terms(settings: RunSettings, size: ModelSize | None) -> list[Term]:
    """Of each process of an engine."""
    actors, on_gpu, parts = settings.actors, settings.actors.num_gpus > 0, settings.actors.tensor_parallel_size
    width = BYTES[settings.model.dtype if actors.dtype == "auto" else actors.dtype] * (1 if on_gpu else CPU_COPIES)
    total = 0 if size is None else size.total
    weights = Term("weights", total * width / parts, f"{_count(total)} x {width:g} B / {parts}", on_gpu)
    return [weights, Term("KV cache", actors.kv_cache_gib * GIB, "actors.kv_cache_gib", on_gpu)]


def memory_lines(settings: RunSettings) -> list[str]:
    """The memory of the plan as a table for people, and a warning where it is more than this machine has."""
    size, learner, actors, buffer = model_size(settings), settings.learner, settings.actors, settings.buffer
    of_each, of_first = ([], []) if size is None else learner_terms(settings, size)
    rows_mb = 2 * buffer.capacity * (ROW_BYTES + ACTION_BYTES * actors.rollout.max_actions) / 1e6
    table: list[tuple[str, int, float, Iterable[Term]]] = [
        ("driver", 1, DRIVER_GIB, ()),
        ("learner", 1, LEARNER_GIB, [*of_each, *of_first]),
        ("other ranks", learner.num_ranks - 1, LEARNER_GIB, of_each),
    ]
    if any(needs_actors(stage, settings.noise) for stage in settings.stages):
        table += [
            ("actors", actors.most * actors.tensor_parallel_size, ENGINE_GIB, engine_terms(settings, size)),
            ("actor pool", 1, SERVICE_GIB, ()),
            ("buffer", buffer.shards, SERVICE_GIB, ()),
        ]
    if size is None:
        lines = ["The size of the model is unknown until it is loaded (nothing here says it)."]
    else:
        trained = size.trained(getattr(settings.model, "adapter", None))
        lines = [f"The model has {_count(size.total)} parameters; {_count(trained)} are trained."]
    total = 0.0
    for name, count, base_gib, terms in table:
        host = {term.label: term.size_bytes / GIB for term in terms if not term.on_gpu}
        host_gib = base_gib + max(host.pop(LOADING, 0.0), sum(host.values()))
        gpu_gib = sum(term.size_bytes / GIB for term in terms if term.on_gpu)
        if count:
            gpu = f" + {gpu_gib:.2f} on the GPU" if gpu_gib else ""
            lines.append(f"{name:<11} {count} x {host_gib:.2f}{gpu}")
            lines += [f"    {base_gib:5.2f}  process without a model"] if terms else []
            lines += [
                f"    {each.size_bytes / GIB:5.2f}  {each.label}: {each.formula}" for each in terms if each.size_bytes
            ]
            total += count * host_gib
    if len(table) > 3:
        lines.append(f"    rows are mapped from disk, at most about {rows_mb:,.1f} MB, and not counted")
    if (settings.cluster.address or os.environ.get("RAY_ADDRESS") or "local") != "local":
        return [*lines, f"all         {total:.2f} over the nodes of the cluster"]
    total, here = total + RAY_GIB + settings.cluster.object_store_gib, psutil.virtual_memory().total / GIB
    lines.append(f"all         {total:.2f} of {here:.2f}, with Ray {RAY_GIB:.2f} and cluster.object_store_gib")
    if total > here:
        lines.append("WARNING: more than this machine has; lower actors.count, or use a cluster.")
    return lines


def _count(number: float) -> str:
    return f"{number / 1e6:,.1f} M"
