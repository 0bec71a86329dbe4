"""Rollouts that take tokens back against plain vLLM: actions per second, and exactness of the recorded numbers.

Two Ray actors hold one engine each: stock vLLM, and `BackspaceEngine`. They take turns, never at the same time, and
run the same number of actions; a backspace is an action. Compared are the best repetitions, because on a shared
machine the noise only ever adds time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import ray
import typer

from actors.engine.checks import check_machine
from actors.engine.interface import EngineSettings, FinishedRollout, Int32, engine_environment
from actors.settings import ActorsSettings
from buffer.processes import RemoteCall
from buffer.trajectory.schema import TokenContract
from launch.errors import setting_up
from tests.benchmarks.backend import (
    Checkpoint,
    Repetitions,
    Seed,
    Timed,
    circumstances,
    measure_in_turn,
)
from tests.benchmarks.models import FIRST_TEXT_ID, SMALL, contract_of, write_small_llama
from tests.integration.local_ray import local_ray

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from tests.benchmarks.rollout_engines import Measurement

PROMPT_LENGTH = 100
ROLLOUTS_PER_PROMPT = 8
KINDS = ("plain", "backspace")
RATES = [0.05, 0.2]
SHOWN = {
    "actions_per_s": "by the share of backspaces",
    "ratio_to_plain_vllm": "at least 0.98",
    "max_logprob_error": "nats, in float32 only; at most 1e-4",
    "num_actions_checked": "",
    "model": "",
}


@dataclass(frozen=True)
class Load:
    """What both engines do."""

    settings: EngineSettings
    contract: TokenContract
    num_actions: int
    prompts: Sequence[Int32]


class Engine:
    """One engine of either kind, in a process of its own."""

    def __init__(self, kind: str, load: Load) -> None:
        from tests.benchmarks.rollout_engines import start_engine

        self._run = start_engine(kind, load)

    def run(self, rate: float) -> Measurement:
        """All rollouts, with a share `rate` of their actions forced."""
        return self._run(rate)


class RolloutBackend:
    """One engine at one rate of backspaces."""

    def __init__(self, kind: str, engine: ActorHandle, rate: float, timeout_s: float) -> None:
        self._name, self._engine, self._rate, self._timeout_s = f"the {kind} engine", engine, rate, timeout_s
        self.measured: list[Measurement] = []

    def run(self) -> Measurement:
        """All rollouts once."""
        call: RemoteCall[Measurement] = RemoteCall(self._name, self._engine.run.remote(self._rate))
        return call.result(self._timeout_s)

    def measure(self) -> Mapping[str, Timed]:
        """`actions`: of all rollouts."""
        self.measured.append(self.run())
        return {"actions": Timed(self.measured[-1].num_actions, self.measured[-1].wall_s)}


def bench(
    checkpoint: Checkpoint = None,
    batch: Annotated[int, typer.Option(min=1, help="Rollouts at a time.")] = 64,
    actions: Annotated[int, typer.Option(min=1, help="Actions per rollout.")] = 128,
    rate: Annotated[list[float], typer.Option(min=0, max=1, help="Share of backspaces among the actions.")] = RATES,
    repetitions: Repetitions = 5,
    dtype: Annotated[str, typer.Option(help="Number format of the engines.")] = "float32",
    kv_cache_gib: Annotated[float, typer.Option(min=0.01, help="Memory of each engine's key-value cache.")] = 1.0,
    timeout: Annotated[float, typer.Option(help="Longest wait for one measurement, in seconds.")] = 600.0,
    seed: Seed = 0,
) -> dict[str, object]:
    """Compare rollouts that take tokens back with plain vLLM: actions per second, and exactness.

    In the result, `ratio_to_plain_vllm` maps each rate to (actions/s with backspace) / (actions/s of plain vLLM);
    `max_logprob_error` is the largest difference from transformers on the reduced text, in nats.
    """
    with setting_up():
        check_machine(enforce_eager=True)
        contract = contract_of(512) if checkpoint is None else _contract_of(checkpoint)
    max_length = PROMPT_LENGTH + actions + 1
    with tempfile.TemporaryDirectory() as folder:
        path = str(checkpoint or write_small_llama(Path(folder), max_length))
        settings = EngineSettings(
            path,
            max_length,
            ActorsSettings.model_validate({"dtype": dtype, "max_concurrent": batch, "kv_cache_gib": kv_cache_gib}),
            max_batched_tokens=max(2048, batch),
            seed=seed,
        )
        shape = (-(-batch // ROLLOUTS_PER_PROMPT), PROMPT_LENGTH)
        distinct = np.random.default_rng(seed).integers(FIRST_TEXT_ID, 512, shape, dtype=np.int32)
        prompts = [distinct[index // ROLLOUTS_PER_PROMPT] for index in range(batch)]
        load = Load(settings, contract, actions, prompts)
        with local_ray(1):
            actor = ray.remote(Engine).options(num_cpus=0, runtime_env={"env_vars": engine_environment()})
            engines = {kind: actor.remote(kind, load) for kind in KINDS}
            backends = {
                f"{kind} {each:.2f}": RolloutBackend(kind, engine, each, timeout)
                for each in rate
                for kind, engine in engines.items()
            }
            for kind in KINDS:
                backends[f"{kind} {rate[0]:.2f}"].run()  # compiles what is compiled on first use
            results = measure_in_turn({name: each.measure for name, each in backends.items()}, repetitions)
        measured = {f"{each:.2f}": backends[f"backspace {each:.2f}"].measured for each in rate}
        logs = [log for of_rate in measured.values() for log in of_rate[0].logs] if dtype == "float32" else []
        error = _max_logprob_error(path, logs, contract) if logs else None
    best = {kind: {each: max(results.rates(f"{kind} {each}", "actions")) for each in measured} for kind in KINDS}
    return {
        "ratio_to_plain_vllm": {each: best["backspace"][each] / best["plain"][each] for each in measured},
        "measured_backspace_rate": {
            each: sum(one.num_backspaces for one in of_rate) / sum(one.num_actions for one in of_rate)
            for each, of_rate in measured.items()
        },
        "actions_per_s": {kind: {each: round(speed, 1) for each, speed in best[kind].items()} for kind in KINDS},
        "max_logprob_error": error,
        "num_actions_checked": sum(len(log.actions) for log in logs),
        "model": str(checkpoint or SMALL),
        **circumstances(dtype=dtype, batch=batch, actions_per_rollout=actions, repetitions=repetitions, seeds=[seed]),
    }


def _contract_of(checkpoint: Path) -> TokenContract:
    from launch.generation import open_checkpoint

    return open_checkpoint(checkpoint).contract


def _max_logprob_error(model_dir: str, logs: Sequence[FinishedRollout], contract: TokenContract) -> float:
    """Compare each recorded log-probability with a transformers forward on the text it was sampled from."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.integration.reference import Distributions, texts_of

    distributions = Distributions(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval())
    texts = [texts_of(log, contract.backspace_id) for log in logs]
    distributions.prepare({text for of_trajectory in texts for text in of_trajectory})
    worst = 0.0
    for log, of_trajectory in zip(logs, texts, strict=True):
        for text, action, recorded in zip(of_trajectory, log.actions.tolist(), log.logprobs.tolist(), strict=True):
            logits = distributions.logits(text)
            logits[[contract.backspace_id, *contract.eos_ids]] = -torch.inf
            forced = action == contract.backspace_id  # with probability one
            expected = 0.0 if forced else logits.log_softmax(-1)[action].item()
            worst = max(worst, abs(expected - recorded))
    return worst
