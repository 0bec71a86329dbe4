"""A weight push against one memory copy of the same bytes: from the learner's call until an actor can generate.

A real publisher in this process and real receivers on a Ray of their own; the engine, where there is one, is the
actors' own. What is measured is one host, where Ray's object store is shared memory.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from actors.engine.checks import check_machine
from actors.engine.interface import EngineSettings, engine_environment
from launch.errors import setting_up
from tests.benchmarks.backend import Backend, Timed, circumstances, measure_in_turn, ray_of_its_own
from tests.benchmarks.table import Table
from tests.benchmarks.weights_ends import PublishingLearner, Relay, TakingActor

if TYPE_CHECKING:
    from transformers import LlamaConfig

START_TIMEOUT_S = 300.0
ANSWER_TIMEOUT_S = 120.0
WARM_UPS = 3
"""Publications before those that count: the first ones meet shared memory that the system has yet to provide."""
PAUSE_S = 0.2

Parts = dict[str, list[float]]

ModelShape = Literal["smollm2-135m", "tiny"]
SHAPES: dict[ModelShape, dict[str, int]] = {
    "smollm2-135m": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}


def bench(
    shape: Annotated[ModelShape, typer.Option("--model", help="Shape of the random model.")] = "smollm2-135m",
    repetitions: Annotated[int, typer.Option(min=1, help="Publications that count; medians count.")] = 7,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Number format of weights and engine.")
    ] = "float32",
    with_engine: Annotated[bool, typer.Option("--engine/--no-engine", help="Load into a real engine, too.")] = True,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> dict[str, object]:
    """Push weights to one actor and to three, against a memory copy of the same bytes (docs/weights.md).

    In the result, `ratio_to_memcpy`: (learner's call until the bytes are verified in the actor's memory, without the
    learner's own computation of the probe) / (one copy of the same bytes); `ratio_to_memcpy_3`: until that is so in all
    of three actors, which only take the bytes; `load_ratio_to_memcpy`: the engine's loading; `push_ratio_to_memcpy`:
    the learner's call until the actor can generate, everything included.
    """
    if with_engine:
        with setting_up():
            check_machine(enforce_eager=True)
    config = _config(shape)
    size_bytes = _num_parameters(config) * (4 if dtype == "float32" else 2)
    push_to = partial(_push_to, config=config, dtype=dtype, seed=seed, repetitions=repetitions)
    with ray_of_its_own(2, object_store_memory=max(4 * size_bytes, 1 << 28)):
        one = push_to(1, with_engine)
        three = push_to(3, with_engine=False)
    copy_s = median(one["memcpy"])
    return {
        "ratio_to_memcpy": median(one["channel"]) / copy_s,
        "ratio_to_memcpy_3": median(three["channel"]) / median(three["memcpy"]),
        "load_ratio_to_memcpy": median(one["load"]) / copy_s if with_engine else None,
        "push_ratio_to_memcpy": median(one["push"]) / copy_s if with_engine else None,
        "ratio_to_fresh_memcpy": median(one["channel"]) / median(one["fresh_memcpy"]),
        "size_bytes": size_bytes,
        "one_actor_s": _report(one),
        "three_actors_s": _report(three),
        "model": shape,
        "dtype": dtype,
        "transport": "object_store",
        **circumstances(repetitions=repetitions, seed=seed),
    }


def table(found: dict[str, object]) -> Table:
    """Every part in milliseconds, for one actor and for three, and the ratios."""
    one, three = (cast(dict[str, dict[str, float]], found[name]) for name in ("one_actor_s", "three_actors_s"))
    ratios = {name: cast(float, found[name]) for name in found if "ratio" in name and found[name] is not None}
    size_gb = cast(int, found["size_bytes"]) / 1e9
    return Table(
        ("", "one actor, ms", "three actors, ms"),
        [(part.replace("_", " "), *(_span(each.get(part)) for each in (one, three))) for part in one],
        [
            ", ".join(f"{name.replace('_', ' ')} {ratio:.2f}" for name, ratio in ratios.items()),
            f"model: {found['model']}, {found['dtype']}, {size_gb:.2f} GB",
        ],
    )


def _span(seconds: Mapping[str, float] | None) -> str:
    if seconds is None:
        return "-"
    middle, least, largest = (1e3 * seconds[name] for name in ("median", "least", "largest"))
    return f"{middle:,.1f} ({least:,.1f}-{largest:,.1f})"


def _report(seconds: Parts) -> dict[str, dict[str, float]]:
    return {
        part: {"median": round(median(all_s), 4), "least": round(min(all_s), 4), "largest": round(max(all_s), 4)}
        for part, all_s in seconds.items()
    }


def _push_to(num_actors: int, with_engine: bool, config: LlamaConfig, dtype: str, seed: int, repetitions: int) -> Parts:
    """Seconds of each part of a push, and of the copies, in each repetition."""
    import ray

    settings = EngineSettings("", dtype=dtype, max_length=64, kv_cache_bytes=1 << 26, load_format="dummy", seed=seed)
    taking = ray.remote(TakingActor).options(num_cpus=0, runtime_env={"env_vars": engine_environment(settings)})
    actors = [taking.remote(config, settings if with_engine else None) for _ in range(num_actors)]
    ray.get([actor.ready.remote() for actor in actors], timeout=START_TIMEOUT_S)
    relay = ray.remote(Relay).options(num_cpus=0).remote(actors)
    learner = PublishingLearner(config, dtype, relay, seed)

    def push() -> Mapping[str, Timed]:
        parts_s = learner.push(ANSWER_TIMEOUT_S)
        time.sleep(PAUSE_S)  # the last publication but one leaves the object store
        return {part: Timed(learner.size_bytes, seconds) for part, seconds in parts_s.items()}

    backends: dict[str, Backend] = {
        "memcpy": lambda: {"copy": Timed(learner.size_bytes, learner.copy_s())},
        "fresh_memcpy": lambda: {"copy": Timed(learner.size_bytes, learner.fresh_copy_s())},
        "push": push,
    }
    results = measure_in_turn(backends, repetitions, WARM_UPS)
    for actor in (*actors, relay):
        ray.kill(actor)
    parts_s = {part: results.seconds("push", part) for part in results.found["push"][0]}
    return parts_s | {name: results.seconds(name, "copy") for name in ("memcpy", "fresh_memcpy")}


def _config(shape: ModelShape) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        architectures=["LlamaForCausalLM"],
    )


def _num_parameters(config: LlamaConfig) -> int:
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return sum(parameter.numel() for parameter in model.parameters())
