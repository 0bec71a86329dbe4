"""Rollouts that take tokens back against plain vLLM: actions per second, and exactness of the recorded numbers.

Two Ray actors hold one engine each: stock vLLM, and `BackspaceEngine`. They take turns, never at the same time, and
run the same number of actions; a backspace is an action. Compared are the best repetitions, because on a shared
machine the noise only ever adds time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import numpy as np
import typer

from actors.engine.checks import check_machine
from actors.engine.interface import EngineSettings, FinishedLog, Int32, SamplingSettings, engine_environment
from buffer.trajectory.schema import TokenContract
from launch.errors import setting_up
from tests.benchmarks.backend import Timed, circumstances, measure_in_turn, ray_of_its_own
from tests.benchmarks.table import Table
from tests.benchmarks.tiny_llama import FIRST_TEXT_ID, TINY_CONTRACT, write_tiny_llama

if TYPE_CHECKING:
    from ray.actor import ActorHandle

PROMPT_LENGTH = 100
ROLLOUTS_PER_PROMPT = 8
CHECKED_ROLLOUTS = 8
FORCED_RATE = "tests.benchmarks.forced_rate:ForcedRateProcessor"

Kind = Literal["plain", "backspace"]
KINDS: tuple[Kind, ...] = ("plain", "backspace")


def bench(
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint to measure with; by default a tiny random model.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rollouts at a time.")] = 64,
    num_actions: Annotated[int, typer.Option("--actions", min=1, help="Actions per rollout.")] = 128,
    rates: Annotated[
        list[float], typer.Option("--rate", min=0.0, max=1.0, help="Share of backspaces among the actions.")
    ] = [0.05, 0.2],  # noqa: B006  # nobody changes it
    repetitions: Annotated[int, typer.Option(min=1, help="Measurements of each pair; the best ones count.")] = 5,
    dtype: Annotated[str, typer.Option(help="Number format of the engines.")] = "float32",
    kv_cache_gib: Annotated[float, typer.Option(min=0.01, help="Memory of each engine's key-value cache.")] = 1.0,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Longest wait for one measurement.")] = 600.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> dict[str, object]:
    """Compare rollouts that take tokens back with plain vLLM: actions per second, and exactness.

    In the result, `ratio_to_plain_vllm` maps each rate to (actions/s with backspace) / (actions/s of plain vLLM);
    `max_logprob_error` is the largest difference from transformers on the reduced text, in nats.
    """
    with setting_up():
        check_machine(enforce_eager=True)
        contract = TINY_CONTRACT if checkpoint is None else _contract_of(checkpoint)
    max_length = PROMPT_LENGTH + num_actions + 1
    with tempfile.TemporaryDirectory() as folder:
        path = str(checkpoint or write_tiny_llama(Path(folder), max_length))
        settings = EngineSettings(
            path,
            dtype=dtype,
            max_length=max_length,
            max_concurrent=batch,
            max_batched_tokens=max(2048, batch),
            seed=seed,
            kv_cache_bytes=int(kv_cache_gib * 2**30),
        )
        shape = (-(-batch // ROLLOUTS_PER_PROMPT), PROMPT_LENGTH)
        distinct = np.random.default_rng(seed).integers(FIRST_TEXT_ID, 512, shape, dtype=np.int32)
        prompts = [distinct[index // ROLLOUTS_PER_PROMPT] for index in range(batch)]
        load = _Load(settings, contract, num_actions, prompts)
        with ray_of_its_own(1, object_store_memory=1 << 28):
            engines = {kind: _start(kind, load) for kind in KINDS}
            backends = {
                f"{kind} {rate:.2f}": _RolloutBackend(kind, engine, rate, timeout_s)
                for rate in rates
                for kind, engine in engines.items()
            }
            for kind in KINDS:
                backends[f"{kind} {rates[0]:.2f}"].run()  # compiles what is compiled on first use
            results = measure_in_turn({name: each.measure for name, each in backends.items()}, repetitions)
        of_rate = {f"{rate:.2f}": backends[f"backspace {rate:.2f}"] for rate in rates}
        logs = [log for backend in of_rate.values() for log in backend.first_logs]
        error = _max_logprob_error(path, logs, contract) if dtype == "float32" else None
    best = {engine: {rate: max(results.rates(f"{engine} {rate}", "actions")) for rate in of_rate} for engine in KINDS}
    return {
        "ratio_to_plain_vllm": {rate: best["backspace"][rate] / best["plain"][rate] for rate in of_rate},
        "measured_backspace_rate": {
            rate: backend.num_backspaces / backend.num_actions for rate, backend in of_rate.items()
        },
        "actions_per_s": {kind: {rate: round(speed, 1) for rate, speed in best[kind].items()} for kind in KINDS},
        "max_logprob_error": error,
        "num_actions_checked": sum(len(log.actions) for log in logs) if error is not None else 0,
        "model": str(checkpoint or "tiny random Llama, 4 layers, width 256, vocabulary 512"),
        "dtype": dtype,
        "batch": batch,
        "actions_per_rollout": num_actions,
        **circumstances(repetitions=repetitions, seed=seed),
    }


def table(found: dict[str, object]) -> Table:
    """One row per share of backspaces, and the largest log-probability error."""
    ratios = cast(dict[str, float], found["ratio_to_plain_vllm"])
    speeds = cast(dict[str, dict[str, float]], found["actions_per_s"])
    error = cast(float | None, found["max_logprob_error"])
    note = (
        "log-probabilities are compared in float32 only"
        if error is None
        else f"largest log-probability error {error:.1e} nats over {found['num_actions_checked']:,} actions"
    )
    return Table(
        ("backspaces", "plain vLLM, actions/s", "with backspace, actions/s", "ratio"),
        [
            (f"{float(rate):.0%}", *(f"{speeds[kind][rate]:,.0f}" for kind in KINDS), f"{ratio:.3f}")
            for rate, ratio in ratios.items()
        ],
        [f"{note}; model: {found['model']}"],
    )


@dataclass(frozen=True)
class _Load:
    settings: EngineSettings
    contract: TokenContract
    num_actions: int
    prompts: Sequence[Int32]


@dataclass(frozen=True)
class _Measurement:
    """logs: a few, of the engine with backspace."""

    num_actions: int
    num_backspaces: int
    wall_s: float
    logs: list[FinishedLog]


@dataclass
class _RolloutBackend:
    """One engine at one rate of backspaces."""

    kind: Kind
    engine: ActorHandle
    rate: float
    timeout_s: float
    num_actions: int = 0
    num_backspaces: int = 0
    first_logs: list[FinishedLog] = field(default_factory=list)

    def run(self) -> _Measurement:
        """All rollouts once.

        Raises:
            TimeoutError: the engine did not answer in time. ray.exceptions.RayActorError: its process died.
        """
        import ray

        try:
            measured: _Measurement = ray.get(self.engine.run.remote(self.rate), timeout=self.timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise TimeoutError(f"the {self.kind} engine did not answer within {self.timeout_s:.0f} s") from None
        return measured

    def measure(self) -> Mapping[str, Timed]:
        """`actions`: of all rollouts."""
        measured = self.run()
        self.num_actions += measured.num_actions
        self.num_backspaces += measured.num_backspaces
        self.first_logs = self.first_logs or measured.logs
        return {"actions": Timed(measured.num_actions, measured.wall_s)}


def _start(kind: Kind, load: _Load) -> ActorHandle:
    """The Ray actor of an engine. vLLM wants its environment before it is imported."""
    import ray

    options = ray.remote(_Engine).options(num_cpus=0, runtime_env={"env_vars": engine_environment(load.settings)})
    return options.remote(kind, load)


class _Engine:
    """One engine of either kind, with the forced rate of backspaces, or of ordinary tokens."""

    def __init__(self, kind: Kind, load: _Load) -> None:
        from tests.benchmarks.forced_rate import ForcedRateProcessor

        ForcedRateProcessor.masked_ids = (load.contract.backspace_id, *load.contract.eos_ids)
        ForcedRateProcessor.forced_id = load.contract.backspace_id if kind == "backspace" else FIRST_TEXT_ID
        self._processor = ForcedRateProcessor
        self._run = _backspace_engine(load) if kind == "backspace" else _plain_engine(load)

    def run(self, rate: float) -> _Measurement:
        """All rollouts, with a share `rate` of their actions forced."""
        self._processor.rate = rate
        return self._run()


def _backspace_engine(load: _Load) -> Callable[[], _Measurement]:
    from actors.engine.engine import BackspaceEngine

    class BenchEngine(BackspaceEngine):
        logits_processors = (*BackspaceEngine.logits_processors, FORCED_RATE)

    engine = BenchEngine(load.settings, load.contract)
    sampling = SamplingSettings(max_new_tokens=load.num_actions, max_actions=load.num_actions)

    def run() -> _Measurement:
        started_s = time.perf_counter()
        for index, prompt in enumerate(load.prompts):
            engine.add(str(index), prompt, sampling)
        logs: list[FinishedLog] = []
        while engine.num_unfinished:
            logs += engine.step()
        wall_s = time.perf_counter() - started_s
        num_backspaces = sum(int((log.actions == load.contract.backspace_id).sum()) for log in logs)
        return _Measurement(sum(len(log.actions) for log in logs), num_backspaces, wall_s, logs[:CHECKED_ROLLOUTS])

    return run


def _plain_engine(load: _Load) -> Callable[[], _Measurement]:
    """Stock vLLM with the same settings: its own scheduler, and no logits processor but the benchmark's."""
    from vllm import EngineArgs, SamplingParams
    from vllm.sampling_params import RequestOutputKind
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
        logits_processors=[FORCED_RATE],
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
    ).create_engine_config()
    config.cache_config.kv_cache_memory_bytes = settings.kv_cache_bytes
    engine = LLMEngine.from_vllm_config(config, disable_log_stats=True)

    def run() -> _Measurement:
        started_s = time.perf_counter()
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
        return _Measurement(num_actions, 0, time.perf_counter() - started_s, [])

    return run


def _contract_of(checkpoint: Path) -> TokenContract:
    from launch.generation import open_checkpoint

    return open_checkpoint(checkpoint).contract


def _max_logprob_error(model_dir: str, logs: Sequence[FinishedLog], contract: TokenContract) -> float:
    """Compare each recorded log-probability with a transformers forward on the text it was sampled from."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.integration.reference import Distributions, texts_of

    distributions = Distributions(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval())
    texts = [texts_of(log, contract.backspace_id) for log in logs]
    distributions.prepare({text for of_log in texts for text in of_log})
    worst = 0.0
    for log, of_log in zip(logs, texts, strict=True):
        for text, action, recorded in zip(of_log, log.actions.tolist(), log.logprobs.tolist(), strict=True):
            logits = distributions.logits(text)
            logits[[contract.backspace_id, *contract.eos_ids]] = -torch.inf
            forced = action == contract.backspace_id  # with probability one
            expected = 0.0 if forced else logits.log_softmax(-1)[action].item()
            worst = max(worst, abs(expected - recorded))
    return worst
