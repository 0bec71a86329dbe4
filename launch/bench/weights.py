"""A weight push against one memory copy of the same bytes: from the learner's call until an actor can generate.

A real publisher and real receivers on a Ray of their own; the engine, where there is one, is the actors' own. What is
measured is one host, where Ray's object store is shared memory.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Literal

from actors.engine.settings import EngineSettings, engine_environment
from launch.bench.hardware import hardware
from launch.bench.weights_sides import Published, PublishingLearner, Taken, TakingActor

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from transformers import LlamaConfig

START_TIMEOUT_S = 300.0
ANSWER_TIMEOUT_S = 120.0
WARM_UPS = 3
"""Publications before those that count: the first ones meet shared memory that the system has yet to provide."""
PAUSE_S = 0.2

ModelShape = Literal["smollm2-135m", "tiny"]


def bench_weights(
    shape: ModelShape = "smollm2-135m",
    *,
    repetitions: int = 7,
    dtype: str = "float32",
    with_engine: bool = True,
    seed: int = 0,
) -> dict[str, object]:
    """Publish a random model to one actor, then to three.

    Args:
        shape: of the model; `smollm2-135m` has 135 M parameters.
        repetitions: publications that count; medians of them are compared.
        with_engine: whether the one actor loads the weights into a real engine. Three actors only take the bytes.

    Returns:
        JSON object. `ratio_to_memcpy`: (learner's call until the bytes are verified in the actor's memory, without the
        learner's own computation of the probe) / (one copy of the same bytes); `ratio_to_memcpy_3`: until that is so in
        all of three actors. `load_ratio_to_memcpy`: the engine's loading. `push_ratio_to_memcpy`: the learner's call
        until the actor can generate, everything included.

    Raises:
        TimeoutError: a push was not taken in time.
    """
    load = _Load(_config(shape), repetitions, dtype, seed)
    with _own_ray(store_bytes=max(4 * load.size_bytes, 1 << 28)):
        one = load.push_to(1, with_engine)
        three = load.push_to(3, with_engine=False)
    copy_s, copy_3_s = median(one.copies_s), median(three.copies_s)
    found: dict[str, object] = {
        "ratio_to_memcpy": median(one.channel_s) / copy_s,
        "ratio_to_memcpy_3": median(three.channel_s) / copy_3_s,
        "load_ratio_to_memcpy": median(one.part_s("load_s")) / copy_s if with_engine else None,
        "push_ratio_to_memcpy": median(one.push_s) / copy_s if with_engine else None,
        "ratio_to_fresh_memcpy": median(one.channel_s) / median(one.fresh_copies_s),
        "size_bytes": one.size_bytes,
        "one_actor_s": one.report(),
        "three_actors_s": three.report(),
        "model": shape,
        "dtype": dtype,
        "repetitions": repetitions,
        "seeds": [seed],
        "hardware": hardware(),
        "command": " ".join(sys.argv),
    }
    return found


class _Measured:
    """The publications to a number of actors."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.copies_s: list[float] = []
        self.fresh_copies_s: list[float] = []
        self._pushes: list[tuple[Published, Sequence[Taken]]] = []

    def add(self, published: Published, taken: Sequence[Taken]) -> None:
        self._pushes.append((published, taken))

    @property
    def channel_s(self) -> list[float]:
        """Until the last actor has the right bytes."""
        return [
            max(each.verified for each in taken) - published.started - published.times.probe_s
            for published, taken in self._pushes
        ]

    @property
    def push_s(self) -> list[float]:
        """Until the last actor can generate; empty without engines."""
        return [
            max(each.ready for each in taken if each.ready is not None) - published.started
            for published, taken in self._pushes
            if all(each.ready is not None for each in taken)
        ]

    def part_s(self, name: str) -> list[float]:
        """One part at the actor that took longest for it."""
        return [max(getattr(each, name) for each in taken) for _, taken in self._pushes]

    def report(self) -> dict[str, object]:
        """Median, least and largest of everything, in seconds."""
        learner: dict[str, Callable[[Published], float]] = {
            "learner_held": lambda each: each.held_s,
            "pack": lambda each: each.times.pack_s,
            "fingerprint": lambda each: each.times.fingerprint_s,
            "learner_probe": lambda each: each.times.probe_s,
            "offer": lambda each: each.times.offer_s,
        }
        parts = {name: [get(published) for published, _ in self._pushes] for name, get in learner.items()}
        parts |= {name: self.part_s(f"{name}_s") for name in ("transfer", "verify")}
        if self.push_s:
            parts |= {"load": self.part_s("load_s"), "engine_probe": self.part_s("probe_s"), "push": self.push_s}
        parts |= {"channel": self.channel_s, "memcpy": self.copies_s, "fresh_memcpy": self.fresh_copies_s}
        return {
            name: {"median": round(median(values), 4), "least": round(min(values), 4), "largest": round(max(values), 4)}
            for name, values in parts.items()
        }


@dataclass(frozen=True)
class _Load:
    config: LlamaConfig
    repetitions: int
    dtype: str
    seed: int

    @property
    def size_bytes(self) -> int:
        return _num_parameters(self.config) * (4 if self.dtype == "float32" else 2)

    def push_to(self, num_actors: int, with_engine: bool) -> _Measured:
        import ray

        settings = EngineSettings(
            "", dtype=self.dtype, max_length=64, kv_cache_bytes=1 << 26, load_format="dummy", seed=self.seed
        )
        taking = ray.remote(TakingActor).options(
            num_cpus=0, max_concurrency=2, runtime_env={"env_vars": engine_environment(settings)}
        )
        actors = [taking.remote(self.config, settings if with_engine else None) for _ in range(num_actors)]
        ray.get([actor.ready.remote() for actor in actors], timeout=START_TIMEOUT_S)
        learning = ray.remote(PublishingLearner).options(num_cpus=0)
        learner = learning.remote(self.config, self.dtype, actors, self.seed)
        measured = _Measured(ray.get(learner.size_bytes.remote(), timeout=START_TIMEOUT_S))
        for repetition in range(WARM_UPS + self.repetitions):
            copy_s: float = ray.get(learner.copy_s.remote(), timeout=ANSWER_TIMEOUT_S)
            fresh_s: float = ray.get(learner.fresh_copy_s.remote(), timeout=ANSWER_TIMEOUT_S)
            published, taken = _push(learner, actors)
            if repetition >= WARM_UPS:
                measured.copies_s.append(copy_s)
                measured.fresh_copies_s.append(fresh_s)
                measured.add(published, taken)
            time.sleep(PAUSE_S)  # the last publication but one leaves the object store
        for actor in (*actors, learner):
            ray.kill(actor)
        return measured


def _push(learner: ActorHandle, actors: Sequence[ActorHandle]) -> tuple[Published, list[Taken]]:
    import ray

    published: Published = ray.get(learner.publish.remote(), timeout=ANSWER_TIMEOUT_S)
    waits = [actor.taken.remote(published.version, ANSWER_TIMEOUT_S) for actor in actors]
    taken: list[Taken] = ray.get(waits, timeout=2 * ANSWER_TIMEOUT_S)
    return published, taken


@contextmanager
def _own_ray(store_bytes: int) -> Iterator[None]:
    import ray

    ray.init(
        address="local",  # never somebody else's Ray that happens to run on this machine
        num_cpus=2,
        object_store_memory=store_bytes,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
    )
    try:
        yield
    finally:
        ray.shutdown()


def _config(shape: ModelShape) -> LlamaConfig:
    from transformers import LlamaConfig

    sizes = {
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
    }[shape]
    return LlamaConfig(
        **sizes,
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
