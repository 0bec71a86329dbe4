"""A weight push against one memory copy of the same bytes: from the learner's call until an actor can generate.

A real publisher in this process and real receivers on a Ray of their own; the engine, where there is one, is the
actors' own. What is measured is one host, where Ray's object store is shared memory.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from actors.engine.checks import check_machine
from actors.engine.interface import EngineSettings, engine_environment
from actors.settings import ActorsSettings
from launch.errors import setting_up
from tests.benchmarks.backend import Backend, Repetitions, Seed, Timed, circumstances, measure_in_turn
from tests.benchmarks.models import llama_config
from tests.benchmarks.weights_ends import PublishingLearner, Relay, TakingActor
from tests.integration.local_ray import local_ray

if TYPE_CHECKING:
    from transformers import LlamaConfig

START_TIMEOUT_S = 300.0
ANSWER_TIMEOUT_S = 120.0
WARM_UPS = 3
"""Publications before those that count: the first ones meet shared memory that the system has yet to provide."""
PAUSE_S = 0.2
SHOWN = {
    "one_actor_s": "",
    "three_actors_s": "",
    "ratio_to_memcpy": "at most 3",
    "ratio_to_memcpy_3": "",
    "load_ratio_to_memcpy": "",
    "push_ratio_to_memcpy": "",
    "ratio_to_fresh_memcpy": "",
    "model": "",
    "size_bytes": "",
}

Parts = dict[str, list[float]]


def bench(
    model: Annotated[Literal["smollm2-135m", "tiny"], typer.Option(help="Shape of the random model.")] = "smollm2-135m",
    repetitions: Repetitions = 7,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Number format of weights and engine.")
    ] = "float32",
    engine: Annotated[bool, typer.Option(help="Load into a real engine, too.")] = True,
    seed: Seed = 0,
) -> dict[str, object]:
    """Push weights to one actor and to three, against a memory copy of the same bytes (docs/weights.md).

    In the result, `ratio_to_memcpy`: (learner's call until the bytes are verified in the actor's memory, without the
    learner's own computation of the probe) / (one copy of the same bytes); `ratio_to_memcpy_3`: until that is so in all
    of three actors, which only take the bytes; `load_ratio_to_memcpy`: the engine's loading; `push_ratio_to_memcpy`:
    the learner's call until the actor can generate, everything included.
    """
    if engine:
        with setting_up():
            check_machine(enforce_eager=True)
    config = llama_config(model, max_length=2048, tied=True)
    size_bytes = _num_parameters(config) * (4 if dtype == "float32" else 2)
    with local_ray(2, object_store_memory=max(4 * size_bytes, 1 << 28)):
        one, three = (
            _push_to(actors, with_engine, config, dtype, seed, repetitions)
            for actors, with_engine in ((1, engine), (3, False))
        )
    copy_s = median(one["memcpy"])
    return {
        "ratio_to_memcpy": median(one["channel"]) / copy_s,
        "ratio_to_memcpy_3": median(three["channel"]) / median(three["memcpy"]),
        "load_ratio_to_memcpy": median(one["load"]) / copy_s if engine else None,
        "push_ratio_to_memcpy": median(one["push"]) / copy_s if engine else None,
        "ratio_to_fresh_memcpy": median(one["channel"]) / median(one["fresh_memcpy"]),
        "size_bytes": size_bytes,
        "one_actor_s": _report(one),
        "three_actors_s": _report(three),
        "transport": "object_store",
        **circumstances(model=model, dtype=dtype, repetitions=repetitions, seeds=[seed]),
    }


def _report(seconds: Parts) -> dict[str, dict[str, float]]:
    return {
        part: {"median": round(median(all_s), 4), "least": round(min(all_s), 4), "largest": round(max(all_s), 4)}
        for part, all_s in seconds.items()
    }


def _push_to(num_actors: int, with_engine: bool, config: LlamaConfig, dtype: str, seed: int, repetitions: int) -> Parts:
    """Seconds of each part of a push, and of the copies, in each repetition."""
    import ray

    actors = ActorsSettings.model_validate({"dtype": dtype, "kv_cache_gib": 1 / 16})
    settings = EngineSettings("", 64, actors, load_format="dummy", seed=seed)
    taking = ray.remote(TakingActor).options(num_cpus=0, runtime_env={"env_vars": engine_environment()})
    takers = [taking.remote(config, settings if with_engine else None) for _ in range(num_actors)]
    ray.get([actor.ready.remote() for actor in takers], timeout=START_TIMEOUT_S)
    relay = ray.remote(Relay).options(num_cpus=0).remote(takers)
    learner = PublishingLearner(config, dtype, relay, seed)

    def push() -> Mapping[str, Timed]:
        parts_s = learner.push(ANSWER_TIMEOUT_S)
        time.sleep(PAUSE_S)  # the last publication but one leaves the object store
        return {part: Timed(learner.size_bytes, seconds) for part, seconds in parts_s.items()}

    backends: dict[str, Backend] = {
        "memcpy": lambda: {"memcpy": Timed(learner.size_bytes, learner.copy_s())},
        "fresh_memcpy": lambda: {"fresh_memcpy": Timed(learner.size_bytes, learner.fresh_copy_s())},
        "push": push,
    }
    found = measure_in_turn(backends, repetitions, WARM_UPS).found
    for actor in (*takers, relay):
        ray.kill(actor)
    return {
        part: [each[part].wall_s for each in found[backend]]
        for backend in ("push", "memcpy", "fresh_memcpy")
        for part in found[backend][0]
    }


def _num_parameters(config: LlamaConfig) -> int:
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return sum(parameter.numel() for parameter in model.parameters())
