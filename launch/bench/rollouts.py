"""Rollouts that take tokens back against plain vLLM: actions per second, and exactness of the recorded numbers.

Two processes hold one engine each: stock vLLM, and `BackspaceEngine`. They take turns, never at the same time, and
run the same number of actions; a backspace is an action. Compared are the best repetitions, because on a shared
machine the noise only ever adds time.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from actors.engine.action_log import FinishedLog, Int32
from actors.engine.settings import EngineSettings, SamplingSettings, engine_environment
from buffer.trajectory.schema import TokenContract
from launch.bench.hardware import hardware
from launch.bench.tiny_llama import FIRST_TEXT_ID, TINY_CONTRACT, write_tiny_llama

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

    from actors.engine.engine import BackspaceEngine

ANSWER_TIMEOUT_S = 600.0
PROMPT_LENGTH = 100
ROLLOUTS_PER_PROMPT = 8

Side = Literal["plain", "backspace"]


@dataclass(frozen=True)
class _Workload:
    settings: EngineSettings
    contract: TokenContract
    num_actions: int
    prompts: Sequence[Int32]


@dataclass(frozen=True)
class _Measurement:
    num_actions: int
    num_backspaces: int
    wall_s: float
    logs: list[FinishedLog]  # a few, of the backspace side


def bench_rollouts(
    model_dir: str | None = None,
    *,
    contract: TokenContract = TINY_CONTRACT,
    rates: Sequence[float] = (0.05, 0.2),
    batch: int = 64,
    num_actions: int = 128,
    repetitions: int = 5,
    dtype: str = "float32",
    seed: int = 0,
    kv_cache_bytes: int = 1 << 30,
    timeout_s: float = ANSWER_TIMEOUT_S,
) -> dict[str, object]:
    """Measure backspace rollouts against plain vLLM.

    Args:
        model_dir: folder in Hugging Face format; None builds a tiny one, for which the engine's own work counts most.
        contract: of the model.
        rates: shares of backspaces among the actions.
        batch: rollouts at a time. num_actions: actions per rollout.
        repetitions: of each pair of measurements.
        timeout_s: longest wait for one measurement.

    Returns:
        JSON object; `ratio_to_plain_vllm` maps each rate to (actions/s with backspace) / (actions/s of plain vLLM),
        `max_logprob_error` is the largest difference from transformers on the reduced text, in nats.

    Raises:
        RuntimeError: an engine process died. TimeoutError: it did not answer in time.
    """
    max_length = PROMPT_LENGTH + num_actions + 1
    with tempfile.TemporaryDirectory() as folder:
        path = model_dir or str(write_tiny_llama(Path(folder), max_length))
        settings = EngineSettings(
            path,
            dtype=dtype,
            max_length=max_length,
            max_concurrent=batch,
            max_batched_tokens=max(2048, batch),
            seed=seed,
            kv_cache_bytes=kv_cache_bytes,
        )
        generator = np.random.default_rng(seed)
        shape = (-(-batch // ROLLOUTS_PER_PROMPT), PROMPT_LENGTH)
        distinct = generator.integers(FIRST_TEXT_ID, 512, shape, dtype=np.int32)
        prompts = [distinct[index // ROLLOUTS_PER_PROMPT] for index in range(batch)]
        load = _Workload(settings, contract, num_actions, prompts)
        with _engine_process("plain", load, timeout_s) as plain, _engine_process("backspace", load, timeout_s) as ours:
            speeds: dict[tuple[Side, float], list[float]] = {}
            counts: dict[float, list[int]] = {rate: [0, 0] for rate in rates}
            logs: list[FinishedLog] = []
            for process in (plain, ours):
                process.measure(rates[0])  # compiles what is compiled on first use
            for repetition in range(repetitions):
                for rate in rates:
                    # Who goes first alternates, so that a drift of the machine favours nobody.
                    for process in (plain, ours) if repetition % 2 == 0 else (ours, plain):
                        measured = process.measure(rate)
                        speeds.setdefault((process.side, rate), []).append(measured.num_actions / measured.wall_s)
                        if process.side == "backspace":
                            counts[rate][0] += measured.num_backspaces
                            counts[rate][1] += measured.num_actions
                            logs += measured.logs if repetition == 0 else []
        error = _max_logprob_error(path, logs, load) if dtype == "float32" else None
    best = {key: max(values) for key, values in speeds.items()}
    return {
        "ratio_to_plain_vllm": {f"{rate:.2f}": best["backspace", rate] / best["plain", rate] for rate in rates},
        "measured_backspace_rate": {f"{rate:.2f}": counts[rate][0] / counts[rate][1] for rate in rates},
        "actions_per_s": {
            side: {f"{rate:.2f}": round(best[side, rate], 1) for rate in rates} for side in ("plain", "backspace")
        },
        "max_logprob_error": error,
        "num_actions_checked": sum(len(log.actions) for log in logs) if error is not None else 0,
        "model": model_dir or "tiny random Llama, 4 layers, width 256, vocabulary 512",
        "dtype": dtype,
        "batch": batch,
        "actions_per_rollout": num_actions,
        "repetitions": repetitions,
        "seeds": [seed],
        "hardware": hardware(),
        "command": " ".join(sys.argv),
    }


@dataclass(frozen=True)
class _EngineProcess:
    side: Side
    process: multiprocessing.process.BaseProcess
    connection: multiprocessing.connection.Connection
    timeout_s: float

    def measure(self, rate: float) -> _Measurement:
        self.connection.send(rate)
        if not self.connection.poll(self.timeout_s):
            raise TimeoutError(f"the {self.side} engine did not answer within {self.timeout_s:.0f} s")
        try:
            measured = self.connection.recv()
        except EOFError:
            raise RuntimeError(f"the {self.side} engine's process died; its error is above") from None
        assert isinstance(measured, _Measurement)
        return measured


@contextmanager
def _engine_process(side: Side, load: _Workload, timeout_s: float) -> Iterator[_EngineProcess]:
    """A process with one engine. Spawned, because vLLM wants its environment before it is imported."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(side, load, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield _EngineProcess(side, process, ours, timeout_s)
    finally:
        ours.close()
        process.join(timeout=10)
        if process.is_alive():
            process.kill()
            process.join(timeout=10)


def _serve(side: Side, load: _Workload, connection: multiprocessing.connection.Connection) -> None:
    os.environ.update(engine_environment(load.settings))
    from launch.bench.forced_rate import ForcedRateProcessor

    ForcedRateProcessor.masked_ids = (load.contract.backspace_id, *load.contract.eos_ids)
    ForcedRateProcessor.forced_id = load.contract.backspace_id if side == "backspace" else FIRST_TEXT_ID
    plain = _plain_engine(load) if side == "plain" else None
    ours = _backspace_engine(load) if side == "backspace" else None
    while True:
        try:
            ForcedRateProcessor.rate = connection.recv()
        except EOFError:
            return
        connection.send(_run_plain(plain, load) if plain is not None else _run_backspace(ours, load))


def _backspace_engine(load: _Workload) -> BackspaceEngine:
    from actors.engine.engine import BackspaceEngine

    class BenchEngine(BackspaceEngine):
        logits_processors = (*BackspaceEngine.logits_processors, "launch.bench.forced_rate:ForcedRateProcessor")

    return BenchEngine(load.settings, load.contract)


def _run_backspace(engine: BackspaceEngine | None, load: _Workload) -> _Measurement:
    assert engine is not None
    sampling = SamplingSettings(max_new_tokens=load.num_actions, max_actions=load.num_actions)
    started = time.perf_counter()
    for index, prompt in enumerate(load.prompts):
        engine.add(str(index), prompt, sampling)
    logs: list[FinishedLog] = []
    while engine.num_unfinished:
        logs += engine.step()
    wall_s = time.perf_counter() - started
    num_backspaces = sum(int((log.actions == load.contract.backspace_id).sum()) for log in logs)
    return _Measurement(sum(len(log.actions) for log in logs), num_backspaces, wall_s, logs[:8])


def _plain_engine(load: _Workload) -> LLMEngine:
    """Stock vLLM with the same settings: its own scheduler, and no logits processor but the benchmark's."""
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from actors.engine.engine import compile_nothing

    settings = load.settings
    compile_nothing(settings.enforce_eager)
    config = EngineArgs(
        model=settings.model_dir,
        dtype=settings.dtype,
        seed=settings.seed,
        max_model_len=settings.max_length,
        max_num_seqs=settings.max_concurrent,
        max_num_batched_tokens=settings.max_batched_tokens,
        block_size=settings.block_size,
        enable_prefix_caching=settings.enable_prefix_caching,
        enforce_eager=settings.enforce_eager,
        skip_tokenizer_init=True,
        generation_config="vllm",
        distributed_executor_backend="uni",
        logits_processors=["launch.bench.forced_rate:ForcedRateProcessor"],
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
    ).create_engine_config()
    config.cache_config.kv_cache_memory_bytes = settings.kv_cache_bytes
    return LLMEngine.from_vllm_config(config, disable_log_stats=True)


def _run_plain(engine: LLMEngine, load: _Workload) -> _Measurement:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    started = time.perf_counter()
    for index, prompt in enumerate(load.prompts):
        params = SamplingParams(
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
    return _Measurement(num_actions, 0, time.perf_counter() - started, [])


def _max_logprob_error(model_dir: str, logs: Sequence[FinishedLog], load: _Workload) -> float:
    """Compare each recorded log-probability with a transformers forward on the text it was sampled from."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    worst = 0.0
    for log in logs:
        text = log.prompt_ids.tolist()
        computed: list[int] = []  # text that `logits` [tokens, vocabulary] belong to
        logits = torch.empty(0)
        for action, recorded in zip(log.actions.tolist(), log.logprobs.tolist(), strict=True):
            if action == load.contract.backspace_id:
                worst = max(worst, abs(recorded))  # forced: probability one
                text.pop()
                continue
            if computed[: len(text)] != text:
                with torch.no_grad():
                    logits = model(torch.tensor([text])).logits[0].float()
                logits[:, [load.contract.backspace_id, *load.contract.eos_ids]] = -torch.inf
                computed = list(text)
            expected = logits[len(text) - 1].log_softmax(-1)[action].item()
            worst = max(worst, abs(expected - recorded))
            text.append(action)
    return worst
