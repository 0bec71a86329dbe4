"""Refusals at the start of an engine: features of vLLM with which taking tokens back would be wrong or
unproved.

Pure functions over vLLM's own configuration objects.
"""

from __future__ import annotations

import math

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig

from actors.engine.rank_executor import RankExecutor


def check_vllm_config(config: VllmConfig) -> None:
    """Refuse a configuration whose scheduler or runner can't roll a request back.

    Raises:
        ValueError: names the setting to change and why.
    """
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
            config.parallel_config.pipeline_parallel_size > 1
        ),
        "data_parallel_size must be 1: actors share the work": config.parallel_config.data_parallel_size > 1,
        "tensor_parallel_size must be 1 unless each rank is an engine of its own (RankedEngine): planted and banned "
        "tokens live in the engine's own process": (
            config.parallel_config.tensor_parallel_size > 1
            and config.parallel_config.distributed_executor_backend is not RankExecutor
        ),
        "kv_transfer_config must be unset: a KV connector would ship blocks that are still rewritten": (
            config.kv_transfer_config is not None
        ),
    }
    broken = [text for text, found in problems.items() if found]
    if broken:
        raise ValueError("the engine can't take tokens back with this configuration: " + "; ".join(broken))


def check_fit(config: VllmConfig, kv_cache_bytes: int) -> None:
    """Refuse what vLLM would find out only when the engine takes its first step, or say in terms of the GPU.

    Raises:
        ValueError: not one text of full length fits into the key-value cache, or the CPU kernels lack the head size.
    """
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
    """Refuse models whose cache can't go one token back: sliding windows free old blocks, recurrent state is
    lossy.

    Raises:
        ValueError: names the layers and their cache.
    """
    for group in kv_cache.kv_cache_groups:
        spec = group.kv_cache_spec
        windowed = getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None)
        if type(spec) is not FullAttentionSpec or windowed:
            window = f" with a window of {windowed} tokens" if windowed else ""
            raise ValueError(
                f"layers {', '.join(group.layer_names[:3])}... keep their state in a {type(spec).__name__}"
                f"{window}: only plain full attention can be rolled back; choose a model without sliding "
                "windows, chunked or recurrent layers"
            )
