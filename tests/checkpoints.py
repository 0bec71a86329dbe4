"""Checkpoints for tests, written without a run around them."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from buffer.trajectory.schema import TokenContract
from launch.run_folder.checkpoints import stage_checkpoints
from launch.settings.run import RunSettings
from learner.checkpoints.checkpoint import TrainingState, take_snapshot
from learner.checkpoints.store import PROGRESS_FILE, LocalCheckpoints, Progress, remove_superseded

CONTRACT = TokenContract(vocab_size=16, backspace_id=3, eos_id=2, tokenizer_hash="abc")


def progress_at(step: int, **changes: object) -> Progress:
    """Progress of a stage of 40 steps."""
    fields = {
        "stage": "pretrain",
        "step": step,
        "stage_steps": 40,
        "policy_version": 3,
        "first_policy_version": 1,
        "expert_stream": {"epoch": 1, "rows": 9},
        "contract": CONTRACT,
    }
    return Progress(**{**fields, **changes})


def write_progress(settings: RunSettings, run_folder: Path, progress: Progress) -> None:
    """A checkpoint of a run as far as it is looked at before anything starts: without a model."""

    def fill(temporary: Path) -> None:
        (temporary / PROGRESS_FILE).write_text(progress.to_json())

    stage_checkpoints(settings, run_folder)[progress.stage].write(progress.step, fill)


def save_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
    state: TrainingState,
    keep: int = 1,
    best_metric: str | None = None,
) -> Path:
    """Write a checkpoint into the folder of its stage and delete what is not kept; gives its path."""
    store = LocalCheckpoints(folder)
    store.write(progress.step, take_snapshot(model, tokenizer, progress, state).write)
    remove_superseded(store, keep, best_metric)
    return store.folder(progress.step)


def checkpoints_of(folder: Path) -> list[Path]:
    """Complete checkpoints in a stage's folder, oldest first."""
    local = LocalCheckpoints(folder)
    return [local.folder(step) for step in local.steps()]
