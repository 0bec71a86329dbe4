"""Checks before an engine starts: of the machine, of the environment, and of features of vLLM with which deletions
would be wrong or untested. Does not import vLLM at the top, since commands call `check_machine` first.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import math
import os
import shutil
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from actors.engine.interface import REQUIRED_ENVIRONMENT

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

KERNEL_LIBRARIES = {"libnuma.so.1": "libnuma1"}
"""Shared libraries of vLLM's CPU kernels -> their Debian packages."""


def check_machine(enforce_eager: bool) -> None:
    """Refuse a machine on which an engine cannot start or would fail at its first step.

    The CPU build of vLLM compiles only with `enforce_eager=False`, with a C++ compiler. On GPUs Triton always compiles
    the launchers of kernels, with a C compiler. Both include Python's headers. The ValueError names everything that is
    missing and its Debian packages.
    """
    on_cpu = _is_cpu_build()
    missing = {name: package for name, package in KERNEL_LIBRARIES.items() if on_cpu and not _loads(name)}
    reason = ""
    if not (on_cpu and enforce_eager):
        reason = " (actors.enforce_eager=false compiles the model)" if on_cpu else " (Triton compiles kernels)"
        usual = ["g++"] if on_cpu else ["gcc", "clang"]
        given = os.environ.get("CXX" if on_cpu else "CC")
        if not any(map(shutil.which, [given] if given else usual)):
            missing[f"a compiler ({given or usual[0]})"] = usual[0]
        if not Path(sysconfig.get_path("include"), "Python.h").is_file():
            missing["Python's headers (Python.h)"] = "python3-dev"
    if missing:
        raise ValueError(
            f"vLLM needs {' and '.join(missing)} on this machine{reason}: `apt-get install "
            f"{' '.join(missing.values())}` brings {'them' if len(missing) > 1 else 'it'} (Debian, Ubuntu)"
        )


def _is_cpu_build() -> bool:
    """Whether the version of the package names a CPU build, as vLLM itself checks."""
    try:
        return "cpu" in importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return True


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def check_environment() -> None:
    """RuntimeError where an environment variable has another value than backspace needs."""
    for name, value in REQUIRED_ENVIRONMENT.items():
        if os.environ.get(name) != value:
            raise RuntimeError(
                f"environment variable {name} is {os.environ.get(name)!r}, the engine needs {value!r}: set "
                "what engine_environment() returns before the process imports vLLM"
            )


def check_vllm_config(config: VllmConfig) -> None:
    """ValueError where scheduler or runner cannot roll a request back; it names the settings and the reasons."""
    parallel = config.parallel_config
    problems = {
        "async_scheduling must be False: the next step is launched before the scheduler sees a backspace": (
            config.scheduler_config.async_scheduling
        ),
        "VLLM_USE_V2_MODEL_RUNNER must be 0: the V2 runner never shortens a request and draws the same token "
        "again after a backspace": config.use_v2_model_runner,
        "speculative_config must be unset: drafted tokens can't be rolled back together with a backspace": (
            config.speculative_config is not None
        ),
        "pipeline_parallel_size must be 1: later stages keep their own copy of the tokens": (
            parallel.pipeline_parallel_size > 1
        ),
        "data_parallel_size must be 1: actors share the work": parallel.data_parallel_size > 1,
        # vLLM's own executors are strings; a class is `RankExecutor`.
        "tensor_parallel_size must be 1 unless each rank is an engine of its own (RankedEngine): forced and banned "
        "tokens live in the engine's own process": (
            parallel.tensor_parallel_size > 1 and not isinstance(parallel.distributed_executor_backend, type)
        ),
        "kv_transfer_config must be unset: a KV connector would ship blocks that are still rewritten": (
            config.kv_transfer_config is not None
        ),
    }
    broken = [text for text, found in problems.items() if found]
    if broken:
        raise ValueError("the engine can't take tokens back with this configuration: " + "; ".join(broken))


def check_fit(config: VllmConfig, kv_cache_bytes: int) -> None:
    """Raise a ValueError where not one text of full length fits into the key-value cache, or the CPU kernels lack the
    head size. vLLM would find out only when the engine takes its first step, or say it in terms of the GPU.
    """
    from vllm.platforms import current_platform

    model, parallel = config.model_config, config.parallel_config
    head_size = model.get_head_size()
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        sizes = CPUAttentionBackend.get_supported_head_sizes()
        if head_size not in sizes:
            raise ValueError(
                f"vLLM has no CPU attention for heads of {head_size} (hidden size over number of heads): choose a "
                f"model with one of {', '.join(map(str, sizes))}"
            )
    block_size = config.cache_config.block_size
    num_tokens = math.ceil(model.max_model_len / block_size) * block_size
    token_bytes = (
        2 * model.get_num_layers(parallel) * model.get_num_kv_heads(parallel) * head_size * model.dtype.itemsize
    )
    if num_tokens * token_bytes > kv_cache_bytes:
        raise ValueError(
            f"one text of {model.max_model_len} tokens needs {num_tokens * token_bytes / 2**30:.3g} GiB of key-value "
            f"cache, more than the {kv_cache_bytes / 2**30:.3g} GiB of actors.kv_cache_gib: raise it, or lower the "
            "length"
        )


def check_kv_cache(kv_cache: KVCacheConfig) -> None:
    """Raise a ValueError where a cache can't go one token back: a window frees blocks, recurrent state is lossy."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    for group in kv_cache.kv_cache_groups:
        spec = group.kv_cache_spec
        windowed = getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None)
        if type(spec) is not FullAttentionSpec or windowed:
            window = f" with a window of {windowed} tokens" if windowed else ""
            raise ValueError(
                f"layers {', '.join(group.layer_names[:3])}... keep their state in a {type(spec).__name__}{window}: "
                "only plain full attention can be rolled back; choose a model without sliding windows, chunked or "
                "recurrent layers"
            )
