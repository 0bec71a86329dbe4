"""What a checkpoint holds, and reading it back. Where checkpoints lie is the business of `learner.checkpoints.store`.

    step-000400/   config.json, model.safetensors, tokenizer files, README.md (model card), training_state.pt
                   (optimizer, schedule, RNG), progress.json, and where adapters are trained adapter/ (see
                   learner.checkpoints.model_files)

The position in the buffer is the step: a draw is named by stage and step, and the buffer's consumption log gives the
steps after the checkpoint the rows that they were given before (see buffer.store.consumption_log).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from buffer.schema import TokenContract
from learner.checkpoints.model_card import CardFacts, model_card
from learner.checkpoints.model_files import ModelSnapshot, host_copy, snapshot_model

PROGRESS_FILE = "progress.json"
TRAINING_STATE_FILE = "training_state.pt"

TrainingState = dict[str, object]
"""Optimizer and schedule state dicts, RNG state: tensors, numbers and strings only (loaded without pickle)."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands, as a small readable file.

    policy_version: newest published; -1 before any. first_policy_version: what the stage's rollouts started with; -1
    in a stage without rollouts. expert_stream: position in the expert data. contract: what token ids mean. metrics:
    mean of each metric over the steps since the checkpoint before.
    """

    stage: str
    step: int
    stage_steps: int
    policy_version: int
    first_policy_version: int
    expert_stream: dict[str, int]
    contract: TokenContract
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether the stage is done."""
        return self.step >= self.stage_steps

    def to_json(self) -> str:
        """As it stands in the file."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str, where: str) -> Progress:
        """Read it back. where: names the checkpoint in errors.

        Raises:
            ValueError: the text is not the progress of a checkpoint of this program.
        """
        try:
            fields = json.loads(text)
            return cls(**{**fields, "contract": TokenContract(**fields["contract"])})
        except (KeyError, TypeError, ValueError) as error:  # other fields, or no JSON
            raise ValueError(f"{where} is not a training checkpoint: its {PROGRESS_FILE} is wrong ({error})") from error


@dataclass(frozen=True)
class CheckpointSnapshot:
    """All of a checkpoint, in host memory of its own."""

    model: ModelSnapshot
    tokenizer: PreTrainedTokenizerBase
    progress: Progress
    training_state: TrainingState

    def write(self, folder: Path) -> None:
        """Write the files into an empty folder."""
        self.model.write(folder)
        self.tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(self._card(), encoding="utf-8")
        torch.save(self.training_state, folder / TRAINING_STATE_FILE)
        (folder / PROGRESS_FILE).write_text(self.progress.to_json(), encoding="utf-8")

    def _card(self) -> str:
        config, progress = self.model.config, self.progress
        return model_card(
            CardFacts(
                name=config.model_type,
                backspace_id=getattr(config, "backspace_token_id", None),
                stage=progress.stage,
                step=progress.step,
                stage_steps=progress.stage_steps,
                vocab_size=config.vocab_size,
            )
        )


def take_snapshot(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress, training_state: TrainingState
) -> CheckpointSnapshot:
    """Copy everything that the next step changes. The other ranks of a sharded model `take_part_in_snapshot`."""
    return CheckpointSnapshot(snapshot_model(model), tokenizer, progress, _copied(training_state))


def read_progress(checkpoint: Path) -> Progress:
    """Progress of one checkpoint.

    Raises:
        ValueError: the folder is not a checkpoint of this program.
    """
    file = checkpoint / PROGRESS_FILE
    if not file.is_file():
        raise ValueError(f"{checkpoint} is not a training checkpoint: it has no {PROGRESS_FILE}")
    return Progress.from_json(file.read_text(encoding="utf-8"), str(checkpoint))


def read_training_state(checkpoint: Path) -> TrainingState:
    """Optimizer, schedule and RNG state of one checkpoint."""
    state: TrainingState = torch.load(checkpoint / TRAINING_STATE_FILE, map_location="cpu", weights_only=True)
    return state


def check_contract(progress: Progress, contract: TokenContract, where: str) -> None:
    """Refuse a checkpoint whose token ids mean something else.

    Raises:
        ValueError: they do.
    """
    if progress.contract != contract:
        raise ValueError(
            f"checkpoint {where} was trained with other tokens ({progress.contract}) than this run has ({contract}): "
            "resume with the task, tokenizer and backspace token that it was trained with, or start a new run"
        )


def _copied(state: TrainingState) -> TrainingState:
    return {key: _copied_value(value) for key, value in state.items()}


def _copied_value(value: object) -> object:
    if isinstance(value, Tensor):
        return host_copy(value)
    if isinstance(value, dict):
        return {key: _copied_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_copied_value(item) for item in value])
    return value
