"""The learner against Hugging Face's `Trainer` and TRL's `SFTTrainer`: trained tokens per second.

All three minimize cross-entropy on the same tokens, from the same weights, in batches of the same texts (their losses
are in the result: they agree). They take turns in one process, and medians are compared. Texts have equal lengths, so
nobody pads; that the state tree needs no padding is an advantage that is not measured here.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from launch.errors import UserError, setting_up
from learner.settings.stages import LearnerSettings
from tests.benchmarks.backend import (
    Checkpoint,
    Clock,
    Repetitions,
    Results,
    Seed,
    Timed,
    circumstances,
    measure_in_turn,
)
from tests.benchmarks.models import SMALL, write_small_llama

TEXTS_PER_PROMPT = 8
NODES_PER_BATCH = (512, 1024, 2048, 4096)
SHOWN = {
    "actions_per_s": "wall-clock time",
    "by_cpu_time.actions_per_s": "",
    "by_cpu_time.ratio_to_hf_trainer": "0.93 to 1 expected",
    "by_cpu_time.ratio_to_trl_sft": "",
    "by_cpu_time.ratio_shared_prompt": "at least 1.4",
    "by_cpu_time.unique_tokens_per_s": "by nodes per micro-batch",
    "sharing_ratio": "",
    "model": "",
    "load_average": "",
}


def bench(
    checkpoint: Checkpoint = None,
    batch: Annotated[int, typer.Option(min=8, help="Texts per step, a multiple of 8.")] = 32,
    length: Annotated[int, typer.Option(min=4, help="Tokens per text.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps per measurement.")] = 3,
    repetitions: Repetitions = 5,
    seed: Seed = 0,
) -> dict[str, object]:
    """Compare training with Hugging Face's Trainer and TRL's SFTTrainer: trained tokens per second.

    Needs the extra `bench`. In the result, `ratio_to_hf_trainer` and `ratio_to_trl_sft` are our trained tokens per
    second over theirs on texts that share nothing; `ratio_shared_prompt`: over the Hugging Face trainer where 8 texts
    share a prompt of half their length; `sharing_ratio`: nodes unshared over nodes there; `unique_tokens_per_s`: by the
    size of micro-batches; `loss`: of each over its first steps; `by_cpu_time`: the same ratios in time of this process.
    """
    if importlib.util.find_spec("trl") is None:
        raise UserError("TRL is not installed; it comes with the extra `bench` (pip install 'sequencematch[bench]')")
    import torch
    from transformers import AutoModelForCausalLM

    from tests.benchmarks.learner_backends import LibraryBackend, OurBackend, make_load

    with setting_up(), tempfile.TemporaryDirectory() as folder:
        path = checkpoint or write_small_llama(Path(folder), length)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        sizes = {"batch": batch, "length": length, "vocab_size": int(model.config.vocab_size), "steps": steps}
        plain = make_load(**sizes, seed=seed, prompt_length=1, texts_per_prompt=1)
        shared = make_load(**sizes, seed=seed, prompt_length=length // 2, texts_per_prompt=TEXTS_PER_PROMPT)
    max_nodes = LearnerSettings().max_tokens_per_micro_batch
    on_plain: dict[str, OurBackend | LibraryBackend] = {
        "ours": OurBackend(model, plain, max_nodes),
        "hf_trainer": LibraryBackend(model, plain, "hf_trainer"),
        "trl_sft": LibraryBackend(model, plain, "trl_sft"),
    }
    ours_shared = OurBackend(model, shared, max_nodes)
    on_shared: dict[str, OurBackend | LibraryBackend] = {
        "ours": ours_shared,
        "hf_trainer": LibraryBackend(model, shared, "hf_trainer"),
    }

    def of_size(size: int) -> Mapping[str, Timed]:
        return OurBackend(model, plain, size).measure()  # one copy of the model at a time

    by_size = {
        str(size): partial(of_size, size)
        for size in [size for size in NODES_PER_BATCH if size <= batch * length] or [batch * length]
    }
    results = {
        load: measure_in_turn({name: each.measure for name, each in backends.items()}, repetitions)
        for load, backends in (("plain", on_plain), ("shared_prompt", on_shared))
    } | {"by_size": measure_in_turn(by_size, repetitions)}
    return {
        **_ratios(results, "wall_s"),
        "by_cpu_time": _ratios(results, "cpu_s"),
        "sharing_ratio": ours_shared.sharing_ratio,
        "padding_fraction": ours_shared.padding_fraction,
        "loss": {
            load: {name: backend.first_loss for name, backend in backends.items()}
            for load, backends in (("plain", on_plain), ("shared_prompt", on_shared))
        },
        "model": str(checkpoint or SMALL),
        "num_parameters": model.num_parameters(),
        "batch": batch,
        "length": length,
        "steps": steps,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
        **circumstances(repetitions=repetitions, seeds=[seed]),
    }


def _ratios(results: Mapping[str, Results], clock: Clock) -> dict[str, object]:
    plain, shared = (results[load].medians("actions", clock) for load in ("plain", "shared_prompt"))
    unique_tokens_per_s = results["by_size"].medians("nodes", clock)
    return {
        "ratio_to_hf_trainer": plain["ours"] / plain["hf_trainer"],
        "ratio_to_trl_sft": plain["ours"] / plain["trl_sft"],
        "ratio_shared_prompt": shared["ours"] / shared["hf_trainer"],
        "actions_per_s": {"plain": plain, "shared_prompt": shared},
        "unique_tokens_per_s": unique_tokens_per_s,
        "unique_tokens_per_s_slowest_over_fastest": min(unique_tokens_per_s.values())
        / max(unique_tokens_per_s.values()),
    }
