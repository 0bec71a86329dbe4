"""Refusals at the start, negative controls, and a canary on the parts of vLLM that backspace rests on."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from transformers import MistralConfig, MistralForCausalLM

from actors.engine.interface import EngineSettings, FinishedRollout, SamplingSettings
from tests.integration.engine_worker import (
    EngineProcessFailed,
    answer,
    fresh_engine,
    in_engine_process,
    message_of,
    small_engine,
)
from tests.integration.reference import compare
from tests.integration.traffic import Request, rollouts
from tests.tiny_models import VOCAB_SIZE, save_tiny_model, tiny_model


def config_refusals(folder: str) -> dict[str, str]:
    """Messages for real vLLM configurations, each with one unsupported feature."""
    from vllm import EngineArgs

    from actors.engine.checks import check_fit, check_vllm_config

    fine = {"model": folder, "dtype": "float32", "max_model_len": 128}
    fine |= {"skip_tokenizer_init": True, "async_scheduling": False}
    check_vllm_config(EngineArgs(**fine).create_engine_config())
    broken = {
        "speculative": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        "pipeline": {"pipeline_parallel_size": 2},
        "tensor": {"tensor_parallel_size": 2},
        "connector": {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
    }
    configs = {name: EngineArgs(**{**fine, **extra}).create_engine_config() for name, extra in broken.items()}
    configs["async"] = EngineArgs(**fine).create_engine_config()
    configs["async"].scheduler_config.async_scheduling = True  # CPU turns it off by itself, a GPU does not
    messages = {}
    for name, config in configs.items():
        messages[name] = message_of(lambda config=config: check_vllm_config(config))
    plain = EngineArgs(**fine).create_engine_config()
    # Without Triton vLLM would not build this configuration, and it reads the variable only until the first engine.
    with mock.patch.object(type(plain), "use_v2_model_runner", True):
        messages["v2 runner"] = message_of(lambda: check_vllm_config(plain))
    token_bytes = 2 * 2 * 1 * 32 * 4  # keys and values, layers, heads, head size, float32
    check_fit(plain, 128 * token_bytes)
    messages["cache"] = message_of(lambda: check_fit(plain, 128 * token_bytes - 1))
    with mock.patch.object(type(plain.model_config), "get_head_size", return_value=24):
        messages["head size"] = message_of(lambda: check_fit(plain, 1 << 30))
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    try:
        messages["environment"] = message_of(lambda: fresh_engine(EngineSettings(folder)))
    finally:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    return messages


def test_unsupported_configurations_are_refused(tmp_path: Path) -> None:
    messages = in_engine_process(config_refusals, str(save_tiny_model(tmp_path, tiny_model())))
    expected = {
        "speculative": "ValueError: .*speculative_config must be unset",
        "pipeline": "ValueError: .*pipeline_parallel_size must be 1",
        "tensor": "ValueError: .*tensor_parallel_size",
        "connector": "ValueError: .*kv_transfer_config must be unset",
        "async": "ValueError: .*async_scheduling must be False",
        "v2 runner": "ValueError: .*VLLM_USE_V2_MODEL_RUNNER must be 0",
        "cache": "ValueError: one text of 128 tokens needs .*actors.kv_cache_gib",
        "head size": "ValueError: vLLM has no CPU attention for heads of 24",
        "environment": "RuntimeError: .*VLLM_USE_V2_MODEL_RUNNER is '1', the engine needs '0'",
    }
    assert messages.keys() == expected.keys()
    for name, pattern in expected.items():
        assert re.match(pattern, messages[name]), messages[name]


def cache_refusals() -> dict[str, str]:
    """Messages for the kinds of layer state that vLLM knows."""
    import torch
    from vllm.v1.kv_cache_interface import (
        ChunkedLocalAttentionSpec,
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        MambaSpec,
        SlidingWindowSpec,
    )

    from actors.engine.checks import check_kv_cache

    shape = {"block_size": 32, "num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}
    specs = {
        "full": FullAttentionSpec(**shape),
        "sliding": SlidingWindowSpec(**shape, sliding_window=64),
        "sliding as full": FullAttentionSpec(**shape, sliding_window=64),
        "chunked": ChunkedLocalAttentionSpec(**shape, attention_chunk_size=64),
        "mamba": MambaSpec(block_size=32, shapes=((2, 2),), dtypes=(torch.float32,)),
    }
    full = KVCacheGroupSpec(["layers.0"], specs["full"])
    return {
        # Among plain layers, as in hybrid models.
        name: message_of(
            lambda spec=spec: check_kv_cache(
                KVCacheConfig(8, [], [full, KVCacheGroupSpec(["layers.1", "layers.2"], spec)])
            )
        )
        for name, spec in specs.items()
    }


def test_caches_that_can_not_go_back_are_refused() -> None:
    messages = in_engine_process(cache_refusals)
    assert messages.pop("full") == "accepted"
    for name, text in {
        "sliding": "SlidingWindowSpec with a window of 64 tokens",
        "sliding as full": "FullAttentionSpec with a window of 64 tokens",
        "chunked": "ChunkedLocalAttentionSpec with a window of 64 tokens",
        "mamba": "MambaSpec",
    }.items():
        assert messages[name].startswith("ValueError: layers layers.1, layers.2... keep their state in a")
        assert text in messages[name]


def refusal_at_start(settings: EngineSettings) -> str:
    return message_of(lambda: fresh_engine(settings))


def test_a_model_with_sliding_windows_does_not_start(tmp_path: Path) -> None:
    config = MistralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=32,
        max_position_embeddings=512,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path)
    message = in_engine_process(refusal_at_start, small_engine(tmp_path))
    assert "window of 32 tokens: only plain full attention can be rolled back" in message


def run_broken(engine_name: str, settings: EngineSettings, requests: list[Request]) -> list[FinishedRollout]:
    from tests.integration import broken_engines

    engine = fresh_engine(settings, getattr(broken_engines, engine_name))
    return answer(engine, requests)


def test_sharing_generated_blocks_would_be_noticed(tmp_path: Path) -> None:
    """Negative control of the exactness test: the engine dies or its log-probabilities are wrong."""
    model = tiny_model(backspace_rate=0.35)
    settings = small_engine(save_tiny_model(tmp_path, model), max_concurrent=64, max_batched_tokens=None)
    requests = rollouts(40, seed=1, longest_prompt=33, max_new_tokens=80, max_actions=240, share_greedy=0.5)
    trajectories: list[FinishedRollout] = []
    failure = ""
    try:
        trajectories = in_engine_process(run_broken, "SharedBlocksEngine", settings, requests)
    except EngineProcessFailed as died:
        failure = str(died)
    result = compare(trajectories, {request.request_id: request.sampling for request in requests}, {0: model})
    assert result.errors or "in cache_full_blocks" in failure


def test_a_missing_mask_at_the_floor_would_be_noticed(tmp_path: Path) -> None:
    settings = small_engine(save_tiny_model(tmp_path, tiny_model(backspace_rate=0.35)))
    with pytest.raises(EngineProcessFailed, match="backspace at the floor"):
        in_engine_process(run_broken, "NoFloorEngine", settings, rollouts(20))


def internals(settings: EngineSettings) -> dict[str, object]:
    """The parts of vLLM that roll-back reaches into, as they are installed."""
    from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.core.sched.utils import check_stop
    from vllm.v1.engine.output_processor import RequestState
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    engine = fresh_engine(settings)
    engine.add("canary", [5] * 40, SamplingSettings(max_new_tokens=4, max_actions=8))
    engine.step()
    scheduler = engine._core.scheduler
    (request,) = scheduler.requests.values()
    (runner_request,) = engine._core.model_executor.driver_worker.worker.model_runner.requests.values()
    engine.abort(["canary"])

    def parameters(function: Callable[..., object]) -> list[str]:
        return list(inspect.signature(function).parameters)

    return {
        "update": parameters(Scheduler._update_request_with_output),
        "add_request": parameters(Scheduler.add_request),
        "reset": parameters(Scheduler.reset_prefix_cache),
        "cache_blocks": parameters(KVCacheCoordinator.cache_blocks),
        "check_stop": parameters(check_stop),
        "abort": parameters(RequestState.make_request_output)[:5],
        "request": [
            type(getattr(request, name)).__name__
            for name in ("_output_token_ids", "_all_token_ids", "block_hashes", "num_computed_tokens")
        ],
        "hasher": request._block_hasher,
        "scheduler": [hasattr(scheduler, n) for n in ("waiting", "kv_holding_waiting", "hash_block_size", "policy")],
        "same state": request.sampling_params.extra_args is runner_request.sampling_params.extra_args,
        "truncation": "del req_state.output_token_ids[num_output_tokens:]"
        in inspect.getsource(GPUModelRunner._update_states),
    }


def test_canary_on_vllm_internals(tmp_path: Path) -> None:
    """Fails first, and says where, when a new vLLM moves what `BackspaceScheduler` and the engine rest on."""
    found = in_engine_process(internals, small_engine(save_tiny_model(tmp_path, tiny_model())))
    assert found == {
        "update": ["self", "request", "new_token_ids", "is_stale"],
        "add_request": ["self", "request"],
        "reset": ["self", "reset_running_requests", "reset_connector"],
        "cache_blocks": ["self", "request", "num_computed_tokens"],
        "check_stop": ["request", "max_model_len"],
        "abort": ["self", "new_token_ids", "pooling_output", "finish_reason", "stop_reason"],
        "request": ["list", "list", "list", "int"],
        "hasher": None,
        "scheduler": [True] * 4,
        "same state": True,
        "truncation": True,
    }
