"""How far a checkpoint is, and what its token ids mean: a small file that is read without torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from buffer.disk import writing_to
from buffer.trajectory.schema import TokenContract

PROGRESS_FILE = "progress.json"
DURABLE_FILE = "checkpoints.json"


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
        return self.step >= self.stage_steps

    def to_json(self) -> str:
        """As it stands in the file."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str, where: str) -> Progress:
        """Read it back. where: names the checkpoint in a ValueError: the text is not that of this program."""
        try:
            fields = json.loads(text)
            return cls(**{**fields, "contract": TokenContract(**fields["contract"])})
        except (KeyError, TypeError, ValueError) as error:  # other fields, or no JSON
            raise ValueError(f"{where} is not a training checkpoint: its {PROGRESS_FILE} is wrong ({error})") from error


def read_progress(checkpoint: Path) -> Progress:
    """Progress of one checkpoint. ValueError: the folder is not a checkpoint of this program."""
    file = checkpoint / PROGRESS_FILE
    if not file.is_file():
        raise ValueError(f"{checkpoint} is not a training checkpoint: it has no {PROGRESS_FILE}")
    return Progress.from_json(file.read_text(encoding="utf-8"), str(checkpoint))


def note_durable(run_folder: Path, progress: Progress) -> None:
    """Remember in the run folder that there is a checkpoint, wherever checkpoints lie. OSError, which names the file:
    the disk refused."""
    file = run_folder / DURABLE_FILE
    temporary = file.with_name(f"{file.name}.tmp")
    with writing_to(temporary):
        temporary.write_text(json.dumps(durable_steps(run_folder) | {progress.stage: progress.step}), encoding="utf-8")
    temporary.rename(file)


def durable_steps(run_folder: Path) -> dict[str, int]:
    """Step of the newest checkpoint that a run has written, by stage; whether it is still there is another matter."""
    file = run_folder / DURABLE_FILE
    steps: dict[str, int] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return steps


def check_contract(progress: Progress, contract: TokenContract, where: str) -> None:
    """Raise ValueError for a checkpoint whose token ids mean something else."""
    if progress.contract != contract:
        raise ValueError(
            f"checkpoint {where} was trained with other tokens ({progress.contract}) than this run has ({contract}): "
            "resume with the task, tokenizer and backspace token that it was trained with, or start a new run"
        )
