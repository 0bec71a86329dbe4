"""Settings of the rollout engine and of one request. Imports nothing heavy: configuration stays instant."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

LoadFormat = Literal["safetensors", "dummy"]


@dataclass(frozen=True)
class EngineSettings:
    """One engine, in the process that creates it.

    model_dir: folder (or hub name) in Hugging Face format; weights in safetensors only, since other files are
        pickles, which run what they hold. `load_format="dummy"` reads only its config.json: the engine is born
        with random numbers and refuses requests until the first `load_weights`.
    dtype: "auto" (as in the config), "float32", "bfloat16", "float16".
    max_length: prompt + text after all deletions, in tokens. A log may hold more actions than that.
    max_concurrent: requests that share one step; further ones wait.
    max_batched_tokens: budget of one step in tokens; longer prompts are split over steps. None: vLLM's
        default.
    kv_cache_bytes: memory of the key-value cache, allocated at the start.
    num_kv_blocks: overrides the number of cache blocks that `kv_cache_bytes` gives (tests of preemption).
    block_size: tokens per cache block; a multiple of 32 on CPU.
    num_threads: OMP threads on CPU. More than one loses whenever anything else runs on the machine.
    """

    model_dir: str
    dtype: str = "auto"
    max_length: int = 1024
    max_concurrent: int = 64
    max_batched_tokens: int | None = None
    seed: int = 0
    kv_cache_bytes: int = 1 << 30
    num_kv_blocks: int | None = None
    block_size: int = 32
    enforce_eager: bool = True
    load_format: LoadFormat = "safetensors"
    enable_prefix_caching: bool = True
    num_threads: int = 1

    def __post_init__(self) -> None:
        for name in ("max_length", "max_concurrent", "kv_cache_bytes", "block_size", "num_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_length < 2:
            raise ValueError("max_length must be at least 2: one prompt token and one generated token")
        if self.max_batched_tokens is not None and self.max_batched_tokens < self.max_concurrent:
            raise ValueError(
                f"max_batched_tokens={self.max_batched_tokens} must be at least max_concurrent="
                f"{self.max_concurrent}: every running request needs a token of each step's budget"
            )


@dataclass(frozen=True)
class SamplingSettings:
    """How one request is sampled.

    temperature: 0 is greedy. top_p: 1 keeps every token.
    max_new_tokens: bound on the generated text *after deletions*. max_actions: bound on the actions,
        deletions included; always finite, because a policy can append and take back for ever.
    backspace: the model may take tokens back; without it the backspace id is never sampled.
    ban_deleted: a token that was deleted at a state is not offered there again. Inference only: the sampled
        distribution is then not a function of the text, which training assumes.
    ban_eos: <eos> is never sampled: only a limit ends the rollout.
    """

    max_new_tokens: int
    max_actions: int
    temperature: float = 1.0
    top_p: float = 1.0
    backspace: bool = True
    ban_deleted: bool = False
    ban_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.max_actions < 1:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} and max_actions={self.max_actions} must be at least 1"
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature={self.temperature} must be >= 0 (0 is greedy) and top_p={self.top_p} in (0, 1]"
            )
        if self.ban_deleted and not self.backspace:
            raise ValueError("ban_deleted has no effect without backspace: set backspace=True or ban_deleted=False")


REQUIRED_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
"""One process, because scheduler, sampler and weights are reached directly; the V1 runner, because it alone
rolls a request back when the scheduler shortens it and draws fresh noise afterwards."""


def engine_environment(settings: EngineSettings) -> dict[str, str]:
    """Environment variables that must be set before the process of an engine imports vLLM."""
    return {
        **REQUIRED_ENVIRONMENT,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "OMP_NUM_THREADS": str(settings.num_threads),
    }


def check_environment() -> None:
    """Refuse an environment in which backspace would be wrong.

    Raises:
        RuntimeError: names the variable and the value it needs.
    """
    for name, value in REQUIRED_ENVIRONMENT.items():
        if os.environ.get(name) != value:
            raise RuntimeError(
                f"environment variable {name} is {os.environ.get(name)!r}, the engine needs {value!r}: set "
                "what engine_environment() returns before the process imports vLLM"
            )
