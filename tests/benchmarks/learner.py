"""The learner against Hugging Face's `Trainer` and TRL's `SFTTrainer`: trained tokens per second.

All three minimise cross-entropy on the same tokens, from the same weights, in batches of the same texts (their losses
are in the result: they agree). They take turns in one process, and medians are compared. Texts have equal lengths, so
nobody pads; that the state tree needs no padding is an advantage that is not measured here.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from launch.errors import UserError, setting_up
from learner.settings.stages import LearnerSettings
from tests.benchmarks.backend import Clock, Results, Timed, circumstances, measure_in_turn
from tests.benchmarks.learner_load import make_load
from tests.benchmarks.table import Table
from tests.benchmarks.tiny_llama import write_tiny_llama

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tests.benchmarks.learner_backends import LibraryBackend, OurBackend

ROLLOUTS_PER_PROMPT = 8
NODES_PER_BATCH = (512, 1024, 2048, 4096)


def bench(
    checkpoint: Annotated[
        Path | None, typer.Option(help="Model to train, in Hugging Face format; by default a small random one.")
    ] = None,
    batch: Annotated[int, typer.Option(min=8, help="Texts per step, a multiple of 8.")] = 32,
    length: Annotated[int, typer.Option(min=4, help="Tokens per text.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps per measurement.")] = 3,
    repetitions: Annotated[int, typer.Option(min=1, help="Measurements of each side; medians count.")] = 5,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> dict[str, object]:
    """Compare training with Hugging Face's Trainer and TRL's SFTTrainer: trained tokens per second.

    Needs the extra `bench`. In the result, `ratio_to_hf_trainer` and `ratio_to_trl_sft` are our trained tokens per
    second over theirs on texts that share nothing; `ratio_shared_prompt`: over the Hugging Face trainer where 8 texts
    share a prompt of half their length; `sharing_ratio`: nodes unshared over nodes there; `nodes_per_s`: by the size of
    micro-batches; `loss`: of each over its first steps; `by_cpu_time`: the same ratios in time of this process.
    """
    if importlib.util.find_spec("trl") is None:
        raise UserError("TRL is not installed; it comes with the extra `bench` (pip install 'sequencematch[bench]')")
    with setting_up():
        model = _load(checkpoint, length)
        vocab_size = int(model.config.vocab_size)
        make = partial(make_load, batch=batch, length=length, vocab_size=vocab_size, steps=steps + 1, seed=seed)
        plain = make(prompt_length=1, logs_per_prompt=1)
        shared = make(prompt_length=length // 2, logs_per_prompt=ROLLOUTS_PER_PROMPT)

    import torch
    import transformers
    import trl

    from tests.benchmarks.learner_backends import LibraryBackend, OurBackend

    max_nodes = LearnerSettings().max_nodes_per_batch
    on_plain: dict[str, OurBackend | LibraryBackend] = {
        "ours": OurBackend(model, plain, steps, max_nodes),
        "hf_trainer": LibraryBackend(model, plain, steps, "hf_trainer"),
        "trl_sft": LibraryBackend(model, plain, steps, "trl_sft"),
    }
    plain_results = measure_in_turn({name: each.measure for name, each in on_plain.items()}, repetitions)
    ours_shared = OurBackend(model, shared, steps, max_nodes)
    on_shared: dict[str, OurBackend | LibraryBackend] = {
        "ours": ours_shared,
        "hf_trainer": LibraryBackend(model, shared, steps, "hf_trainer"),
    }
    shared_results = measure_in_turn({name: each.measure for name, each in on_shared.items()}, repetitions)
    sizes = [size for size in NODES_PER_BATCH if size <= batch * length] or [batch * length]

    def of_size(size: int) -> Mapping[str, Timed]:
        return OurBackend(model, plain, steps, size).measure()  # one copy of the model at a time

    by_size = {str(size): partial(of_size, size) for size in sizes}
    results = (plain_results, shared_results, measure_in_turn(by_size, repetitions))
    return {
        **_ratios(*results, "wall_s"),
        "by_cpu_time": _ratios(*results, "cpu_s"),
        "sharing_ratio": ours_shared.sharing_ratio,
        "padding_share": ours_shared.padding_share,
        "loss": {"plain": _losses(on_plain), "shared_prompt": _losses(on_shared)},
        "model": str(checkpoint or f"small random Llama, 4 layers, width 256, vocabulary {vocab_size}"),
        "num_parameters": model.num_parameters(),
        "batch": batch,
        "length": length,
        "steps": steps,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__},
        **circumstances(repetitions=repetitions, seed=seed),
    }


def _load(checkpoint: Path | None, length: int) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint or write_tiny_llama(Path(folder), length)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model


def _losses(backends: Mapping[str, OurBackend | LibraryBackend]) -> dict[str, float]:
    return {name: backend.first_loss for name, backend in backends.items()}


def _ratios(plain: Results, shared: Results, by_size: Results, clock: Clock) -> dict[str, object]:
    plain_rates, shared_rates, nodes_per_s = (
        {name: results.rate(name, work, clock) for name in results.found}
        for results, work in ((plain, "actions"), (shared, "actions"), (by_size, "nodes"))
    )
    return {
        "ratio_to_hf_trainer": plain_rates["ours"] / plain_rates["hf_trainer"],
        "ratio_to_trl_sft": plain_rates["ours"] / plain_rates["trl_sft"],
        "ratio_shared_prompt": shared_rates["ours"] / shared_rates["hf_trainer"],
        "actions_per_s": {"plain": plain_rates, "shared_prompt": shared_rates},
        "nodes_per_s": nodes_per_s,
        "nodes_per_s_slowest_over_fastest": min(nodes_per_s.values()) / max(nodes_per_s.values()),
    }


def table(found: dict[str, object]) -> Table:
    """A row per load and clock, and lines on the sizes of micro-batches and on sharing."""
    by_cpu = cast(dict[str, dict[str, dict[str, float]]], found["by_cpu_time"])
    rows = []
    for clock, speeds in (
        ("wall", cast(dict[str, dict[str, float]], found["actions_per_s"])),
        ("CPU", by_cpu["actions_per_s"]),
    ):
        for load, title in (("plain", "nothing shared"), ("shared_prompt", "8 share half")):
            rates = speeds[load]
            cells = [f"{title}, {clock}", f"{rates['ours']:,.0f}"]
            for rival in ("hf_trainer", "trl_sft"):
                rate = rates.get(rival)
                cells += ["", ""] if rate is None else [f"{rate:,.0f}", f"{rates['ours'] / rate:.3f}"]
            rows.append(cells)
    sizes = ", ".join(
        f"{rate:,.0f} at {int(size):,}" for size, rate in cast(dict[str, float], found["nodes_per_s"]).items()
    )
    notes = [
        f"nodes/s by nodes per micro-batch: {sizes}",
        f"sharing ratio {cast(float, found['sharing_ratio']):.2f}; model: {found['model']}; "
        f"load average {found['load_average']}",
    ]
    return Table(("trained tokens/s", "ours", "HF Trainer", "ratio", "TRL SFT", "ratio"), rows, notes)
