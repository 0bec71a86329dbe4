"""Checkpoints: Hugging Face format, plus what resuming needs, written beside and renamed into place.

    checkpoints/<stage>/step-000400/   config.json, model.safetensors, tokenizer files, README.md (model card),
                                       training_state.pt (optimizer, schedule, RNG), progress.json

A folder without `.tmp` in its name is complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_STEP = re.compile(r"^step-(\d+)$")

TrainingState = dict[str, object]
"""Optimizer and schedule state dicts, RNG state: tensors, numbers and strings only (loaded without pickle)."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands, as a small readable file."""

    stage: str
    step: int
    stage_steps: int
    policy_version: int  # newest published
    expert_stream: dict[str, int]

    @property
    def finished(self) -> bool:
        """Whether the stage is done."""
        return self.step >= self.stage_steps


def save_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
    training_state: TrainingState,
    keep: int,
) -> Path:
    """Write `folder/step-<n>` atomically and delete all but the `keep` newest; gives the checkpoint's path."""
    final = folder / f"step-{progress.step:06d}"
    temporary = folder / f"{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / "README.md").write_text(_model_card(model, progress), encoding="utf-8")
    torch.save(training_state, temporary / "training_state.pt")
    (temporary / "progress.json").write_text(json.dumps(asdict(progress), indent=2), encoding="utf-8")
    for file in temporary.iterdir():
        _fsync(file)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _fsync(folder)
    for old in checkpoints_of(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints_of(folder: Path) -> list[Path]:
    """Complete checkpoints of a stage's folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _STEP.match(path.name))


def read_progress(checkpoint: Path) -> Progress:
    """Progress of one checkpoint.

    Raises:
        ValueError: the folder is not a checkpoint of this program.
    """
    file = checkpoint / "progress.json"
    if not file.is_file():
        raise ValueError(f"{checkpoint} is not a training checkpoint: it has no progress.json")
    return Progress(**json.loads(file.read_text(encoding="utf-8")))


def read_training_state(checkpoint: Path) -> TrainingState:
    """Optimizer, schedule and RNG state of one checkpoint."""
    state: TrainingState = torch.load(checkpoint / "training_state.pt", map_location="cpu", weights_only=True)
    return state


def load_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Load a checkpoint's weights into `model`, in place.

    Raises:
        ValueError: the checkpoint lacks a tensor of the model, or holds one that the model does not have.
    """
    state: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        state |= load_file(file)
    own = model.state_dict()
    loaded_memory = {own[name].data_ptr() for name in state if name in own}
    result = model.load_state_dict(state, strict=False)
    # A tied tensor is saved once; under its other name it is loaded all the same.
    missing = [name for name in result.missing_keys if own[name].data_ptr() not in loaded_memory]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"checkpoint {checkpoint} does not fit the model: missing {missing}, unexpected {result.unexpected_keys}"
        )


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _model_card(model: PreTrainedModel, progress: Progress) -> str:
    backspace_id = getattr(model.config, "backspace_token_id", None)
    return f"""---
library_name: transformers
tags: [sequencematch]
---

# {model.config.model_type} trained with sequencematch

Stage `{progress.stage}`, step {progress.step} of {progress.stage_steps}.

The vocabulary holds a backspace action, id {backspace_id} (`backspace_token_id` in `config.json`). It never stands in
the model's input: when the model chooses it, the last generated token is removed and generation goes on from the
shorter text; it may not be chosen at the end of the prompt. `sequencematch generate CHECKPOINT --prompt ...` does
this inside vLLM. A generator that does not know the action must never sample it.
"""
