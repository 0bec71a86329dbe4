"""The learner against Hugging Face's `Trainer` and TRL's `SFTTrainer`: trained tokens per second.

All three minimise cross-entropy on the same tokens, from the same weights, in batches of the same texts (their losses
are in the result: they agree). They take turns in one process, and medians are compared. Texts have equal lengths, so
nobody pads; that the state tree needs no padding is an advantage that is not measured here.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from launch.bench.hardware import hardware
from launch.bench.learner_load import TrainingLoad, make_load
from launch.bench.tiny_llama import write_tiny_llama

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from launch.bench.learner_sides import Moment, Side, SideName

ROLLOUTS_PER_PROMPT = 8

NODES_PER_BATCH = (512, 1024, 2048, 4096)


@dataclass(frozen=True)
class LearnerBenchmark:
    """What is measured; made by `prepare_learner_benchmark`.

    plain: texts with a prompt of one token that share nothing. shared: 8 texts share a prompt of half their length.
    steps: per measurement. repetitions: of each measurement; sides take turns.
    nodes_per_batch: sizes of micro-batches whose speed is compared, on `plain`.
    """

    model: PreTrainedModel
    model_name: str
    plain: TrainingLoad
    shared: TrainingLoad
    steps: int
    repetitions: int
    nodes_per_batch: tuple[int, ...]
    seed: int

    def measure(self) -> dict[str, object]:
        """Measure all; minutes.

        Returns:
            JSON object. `ratio_to_hf_trainer` and `ratio_to_trl_sft`: our trained tokens per second over theirs on
            `plain`; `ratio_shared_prompt`: over the Hugging Face trainer on `shared`; `sharing_ratio`: nodes unshared
            over nodes there; `loss`: of each over its first steps; `by_cpu_time`: the same ratios in time of this
            process, which a busy machine disturbs less.
        """
        plain = self._compare(self.plain, ("ours", "hf_trainer", "trl_sft"))
        shared = self._compare(self.shared, ("ours", "hf_trainer"))
        by_size = self._nodes_per_s()
        return {
            **_ratios(plain.rates, shared.rates, by_size, "wall_s"),
            "by_cpu_time": _ratios(plain.rates, shared.rates, by_size, "cpu_s"),
            "sharing_ratio": shared.sharing_ratio,
            "padding_share": shared.padding_share,
            "loss": {"plain": plain.losses, "shared_prompt": shared.losses},
            "model": self.model_name,
            "num_parameters": self.model.num_parameters(),
            "batch": self.plain.batch,
            "length": self.plain.length,
            "steps": self.steps,
            "repetitions": self.repetitions,
            "seeds": [self.seed],
            **_circumstances(),
        }

    def _compare(self, load: TrainingLoad, names: tuple[SideName, ...]) -> _Comparison:
        from launch.bench.learner_sides import LibrarySide, OurSide
        from learner.settings.stages import LearnerSettings

        ours = OurSide(self.model, load, LearnerSettings().max_nodes_per_batch)
        sides: dict[SideName, Side] = {
            name: ours if name == "ours" else LibrarySide(self.model, load, name) for name in names
        }
        elapsed: dict[str, list[Moment]] = {name: [] for name in names}
        losses: dict[str, float] = {}
        for repetition in range(self.repetitions):
            # Who goes first alternates, so that a drift of the machine favours nobody.
            for name in names if repetition % 2 == 0 else reversed(names):
                elapsed[name].append(sides[name].run(self.steps))
                losses.setdefault(name, sides[name].loss)
        rates = _rates(elapsed, self.steps * load.actions_per_step)
        return _Comparison(rates, losses, ours.sharing_ratio, ours.padding_share)

    def _nodes_per_s(self) -> Rates:
        """For each size of the micro-batches that one draw is cut into."""
        from launch.bench.learner_sides import OurSide

        load, sizes = self.plain, self.nodes_per_batch
        elapsed: dict[str, list[Moment]] = {str(size): [] for size in sizes}
        for repetition in range(self.repetitions):
            for size in sizes if repetition % 2 == 0 else reversed(sizes):
                side = OurSide(self.model, load, size)  # one copy of the model at a time
                elapsed[str(size)].append(side.run(self.steps))
        return _rates(elapsed, self.steps * load.batch * load.length)


Clock = Literal["wall_s", "cpu_s"]

Rates = dict[str, dict[Clock, float]]
"""Of each competitor: median per second of wall-clock time, and of the process's own."""


@dataclass(frozen=True)
class _Comparison:
    """rates: of trained tokens. losses: of each side over its first steps."""

    rates: Rates
    losses: dict[str, float]
    sharing_ratio: float
    padding_share: float


def _rates(elapsed: dict[str, list[Moment]], amount: int) -> Rates:
    return {
        name: {
            "wall_s": amount / statistics.median(each.wall_s for each in found),
            "cpu_s": amount / statistics.median(each.cpu_s for each in found),
        }
        for name, found in elapsed.items()
    }


def _ratios(plain: Rates, shared: Rates, by_size: Rates, clock: Clock) -> dict[str, object]:
    plain_rates, shared_rates, nodes_per_s = (
        {name: each[clock] for name, each in rates.items()} for rates in (plain, shared, by_size)
    )
    return {
        "ratio_to_hf_trainer": plain_rates["ours"] / plain_rates["hf_trainer"],
        "ratio_to_trl_sft": plain_rates["ours"] / plain_rates["trl_sft"],
        "ratio_shared_prompt": shared_rates["ours"] / shared_rates["hf_trainer"],
        "actions_per_s": {"plain": plain_rates, "shared_prompt": shared_rates},
        "nodes_per_s": nodes_per_s,
        "nodes_per_s_slowest_over_fastest": min(nodes_per_s.values()) / max(nodes_per_s.values()),
    }


def prepare_learner_benchmark(
    model_dir: str | None = None,
    *,
    batch: int = 32,
    length: int = 128,
    steps: int = 3,
    repetitions: int = 5,
    nodes_per_batch: tuple[int, ...] = NODES_PER_BATCH,
    seed: int = 0,
) -> LearnerBenchmark:
    """Load the model and make the texts.

    Args:
        model_dir: folder in Hugging Face format; None builds a small random one.
        batch: texts per step, a multiple of 8. length: tokens of each.
        nodes_per_batch: those beyond the nodes of a step are left out.

    Raises:
        ValueError, OSError: sizes that do not fit together, or no such model. ImportError: TRL is not installed.
    """
    if importlib.util.find_spec("trl") is None:
        raise ImportError("TRL is not installed; it comes with the extra `bench` (pip install 'sequencematch[bench]')")
    model = _load(model_dir, length)
    vocab_size = int(model.config.vocab_size)
    make = partial(make_load, batch=batch, length=length, vocab_size=vocab_size, steps=steps + 1, seed=seed)
    return LearnerBenchmark(
        model=model,
        model_name=model_dir or f"small random Llama, 4 layers, width 256, vocabulary {vocab_size}",
        plain=make(prompt_length=1, logs_per_prompt=1),
        shared=make(prompt_length=length // 2, logs_per_prompt=ROLLOUTS_PER_PROMPT),
        steps=steps,
        repetitions=repetitions,
        nodes_per_batch=tuple(size for size in nodes_per_batch if size <= batch * length) or (batch * length,),
        seed=seed,
    )


def _load(model_dir: str | None, length: int) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        path = model_dir or write_tiny_llama(Path(folder), length)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model


def _circumstances() -> dict[str, object]:
    import torch
    import transformers
    import trl

    return {
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__},
        "hardware": hardware(),
        "command": " ".join(sys.argv),
    }
