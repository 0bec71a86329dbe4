"""The engines that are compared, stock vLLM and ours, with the same rate of forced actions; a process has one of them.

vLLM wants its environment before it is imported, so only the process of an engine imports this.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from vllm import EngineArgs
from vllm import SamplingParams as PlainSampling
from vllm.config import VllmConfig
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from actors.engine.engine import BackspaceEngine, compile_nothing
from actors.engine.interface import FinishedRollout, SamplingSettings
from tests.benchmarks.models import FIRST_TEXT_ID

if TYPE_CHECKING:
    from tests.benchmarks.rollouts import Load

CHECKED_ROLLOUTS = 8
FORCED_RATE = f"{__name__}:ForcedRateProcessor"


@dataclass(frozen=True)
class Measurement:
    """All rollouts once. logs: a few, of the engine with backspace."""

    num_actions: int
    wall_s: float
    num_backspaces: int = 0
    logs: list[FinishedRollout] = field(default_factory=list)


class ForcedRateProcessor(LogitsProcessor):  # type: ignore[misc]  # vLLM ships no types
    """Takes tokens back at an exact rate. In the plain engine it forces an ordinary token just as often, so that the
    ratio of the two contains the roll-back and nothing of the forcing.

    Class variables, because vLLM builds the instance. rate: share of the actions after a text's first token that are
    forced. forced_id: the id they get. masked_ids: ids that are never sampled otherwise.
    """

    rate: ClassVar[float] = 0.0
    forced_id: ClassVar[int] = 0
    masked_ids: ClassVar[tuple[int, ...]] = ()

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._outputs: dict[int, list[int]] = {}
        self._noise = np.random.default_rng(0)
        self._masked = torch.tensor(self.masked_ids, dtype=torch.int64, device=device)

    @classmethod
    def validate_params(cls, sampling_params: PlainSampling) -> None:
        """Everything is valid."""

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Keep each row's generated text; vLLM updates the list in place."""
        process_dict_updates(self._outputs, batch_update, lambda params, prompt, output: output)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Force some rows of `logits` [batch, vocabulary], in place."""
        logits[:, self._masked] = float("-inf")
        noise = self._noise.random(len(logits)) < self.rate
        rows = [row for row, output in self._outputs.items() if output and noise[row]]
        if rows:
            logits[rows] = float("-inf")
            logits[rows, self.forced_id] = 0.0
        return logits


def start_engine(kind: str, load: Load) -> Callable[[float], Measurement]:
    """An engine in this process; gives what makes all rollouts with a share of their actions forced."""
    ForcedRateProcessor.masked_ids = (load.contract.backspace_id, *load.contract.eos_ids)
    ForcedRateProcessor.forced_id = load.contract.backspace_id if kind == "backspace" else FIRST_TEXT_ID
    make_rollouts = _backspace_engine(load) if kind == "backspace" else _plain_engine(load)

    def run(rate: float) -> Measurement:
        ForcedRateProcessor.rate = rate
        return make_rollouts()

    return run


def _backspace_engine(load: Load) -> Callable[[], Measurement]:
    class BenchEngine(BackspaceEngine):
        logits_processors = (*BackspaceEngine.logits_processors, FORCED_RATE)

    engine = BenchEngine(load.settings, load.contract)
    sampling = SamplingSettings(max_new_tokens=load.num_actions, max_actions=load.num_actions)

    def run() -> Measurement:
        started_s = time.perf_counter()
        for index, prompt in enumerate(load.prompts):
            engine.add(str(index), prompt, sampling)
        logs: list[FinishedRollout] = []
        while engine.num_unfinished:
            logs += engine.step()
        wall_s = time.perf_counter() - started_s
        num_backspaces = sum(int((log.actions == load.contract.backspace_id).sum()) for log in logs)
        return Measurement(sum(len(log.actions) for log in logs), wall_s, num_backspaces, logs[:CHECKED_ROLLOUTS])

    return run


def _plain_engine(load: Load) -> Callable[[], Measurement]:
    """Stock vLLM with the same settings: its own scheduler, and no logits processor but the benchmark's."""
    settings = load.settings
    compile_nothing(settings.actors.enforce_eager)
    config = EngineArgs(
        model=settings.model_dir,
        dtype=settings.actors.dtype,
        seed=settings.seed,
        max_model_len=settings.max_length,
        max_num_seqs=settings.actors.max_concurrent,
        max_num_batched_tokens=settings.max_batched_tokens,
        block_size=settings.block_size,
        enable_prefix_caching=settings.enable_prefix_caching,
        enforce_eager=settings.actors.enforce_eager,
        skip_tokenizer_init=True,
        generation_config="vllm",
        distributed_executor_backend="uni",
        logits_processors=[FORCED_RATE],
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
    ).create_engine_config()
    config.cache_config.kv_cache_memory_bytes = settings.kv_cache_bytes
    engine = LLMEngine.from_vllm_config(config, disable_log_stats=True)

    def run() -> Measurement:
        started_s = time.perf_counter()
        for index, prompt in enumerate(load.prompts):
            params = PlainSampling(
                max_tokens=load.num_actions,
                ignore_eos=True,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(str(index), {"prompt_token_ids": prompt.tolist()}, params)
        num_actions = 0
        while engine.has_unfinished_requests():
            num_actions += sum(len(output.outputs[0].token_ids) for output in engine.step())
        return Measurement(num_actions, time.perf_counter() - started_s)

    return run
