"""Checkpoints: Hugging Face format, plus what resuming needs, written beside and renamed into place.

    checkpoints/<stage>/step-000400/   config.json, model.safetensors, tokenizer files, README.md (model card),
                                       training_state.pt (optimizer, schedule, RNG), progress.json, and where adapters
                                       are trained adapter/ (see learner.model_files)

A folder without `.tmp` in its name is complete, whenever the process is killed: folders are filled and emptied under
a `.tmp` name only. Where a step is saved again, the checkpoint that it replaces stays as `step-<n>.replaced` until the
new one is in place. One process at a time writes to a stage's folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from learner.model_card import CardFacts, model_card
from learner.model_files import write_model

_CHECKPOINT = re.compile(r"step-(\d{6,})(?:\.replaced)?")

TrainingState = dict[str, object]
"""Optimizer and schedule state dicts, RNG state: tensors, numbers and strings only (loaded without pickle)."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands, as a small readable file."""

    stage: str
    step: int
    stage_steps: int
    policy_version: int  # newest published; -1 before any
    first_policy_version: int  # that the stage's rollouts started with; -1 in a stage without rollouts
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
    assert keep > 0
    final = folder / f"step-{progress.step:06d}"
    temporary = folder / f"{final.name}.tmp"
    _sweep(folder)
    temporary.mkdir(parents=True)
    write_model(temporary, model)
    tokenizer.save_pretrained(temporary)
    (temporary / "README.md").write_text(_card(model, progress), encoding="utf-8")
    torch.save(training_state, temporary / "training_state.pt")
    (temporary / "progress.json").write_text(json.dumps(asdict(progress), indent=2), encoding="utf-8")
    for path in temporary.rglob("*"):
        _fsync(path)
    _fsync(temporary)
    if final.exists():
        final.rename(_replaced(final))
    temporary.rename(final)
    _fsync(folder)
    _sweep(folder)
    for old in checkpoints_of(folder)[:-keep]:
        _discard(old)
    return final


def checkpoints_of(folder: Path) -> list[Path]:
    """Complete checkpoints of a stage's folder, oldest first."""
    if not folder.is_dir():
        return []
    by_step: dict[int, Path] = {}
    for path in sorted(folder.iterdir(), reverse=True):  # `step-<n>` after, and so over, `step-<n>.replaced`
        if (match := _CHECKPOINT.fullmatch(path.name)) and path.is_dir():
            by_step[int(match[1])] = path
    return [by_step[step] for step in sorted(by_step)]  # by number: the seventh digit comes after a million steps


def _replaced(final: Path) -> Path:
    return final.with_name(f"{final.name}.replaced")


def _sweep(folder: Path) -> None:
    """Remove what a killed process left half-written or half-removed, and checkpoints that have been replaced."""
    for leftover in folder.glob("step-*.tmp"):
        shutil.rmtree(leftover)
    for final in checkpoints_of(folder):
        if _replaced(final).is_dir():
            _discard(_replaced(final))


def _discard(path: Path) -> None:
    """Remove a checkpoint; renamed first, since a folder that is being emptied must not look complete."""
    doomed = path.with_name(f"{path.name}.removed.tmp")
    path.rename(doomed)
    shutil.rmtree(doomed)


def read_progress(checkpoint: Path) -> Progress:
    """Progress of one checkpoint.

    Raises:
        ValueError: the folder is not a checkpoint of this program.
    """
    file = checkpoint / "progress.json"
    if not file.is_file():
        raise ValueError(f"{checkpoint} is not a training checkpoint: it has no progress.json")
    try:
        return Progress(**json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:  # other fields, or no JSON
        raise ValueError(f"{checkpoint} is not a training checkpoint: its progress.json is wrong ({error})") from error


def read_training_state(checkpoint: Path) -> TrainingState:
    """Optimizer, schedule and RNG state of one checkpoint."""
    state: TrainingState = torch.load(checkpoint / "training_state.pt", map_location="cpu", weights_only=True)
    return state


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _card(model: PreTrainedModel, progress: Progress) -> str:
    return model_card(
        CardFacts(
            name=model.config.model_type,
            backspace_id=getattr(model.config, "backspace_token_id", None),
            stage=progress.stage,
            step=progress.step,
            stage_steps=progress.stage_steps,
            vocab_size=model.config.vocab_size,
        )
    )
