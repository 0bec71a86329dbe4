"""What a checkpoint holds, and reading it back. Where checkpoints lie is the business of `learner.checkpoints.store`.

    step-000400/   config.json, model.safetensors, tokenizer files, README.md (model card), training_state.pt
                   (optimizer, RNG), progress.json, and where adapters are trained adapter/ (see
                   learner.checkpoints.model_files)

The position in the buffer is the step: a draw is named by stage and step, and the buffer's catalog gives the
steps after the checkpoint the rows that they were given before (see buffer.store.draws).
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from buffer.disk import is_disk_full
from buffer.trajectory.schema import TokenContract
from learner.checkpoints.model_card import CardFacts, model_card
from learner.checkpoints.model_files import ModelSnapshot, host_copy, snapshot_model, snapshot_without_weights
from learner.checkpoints.store import PROGRESS_FILE, Progress

TRAINING_STATE_FILE = "training_state.pt"

TrainingState = dict[str, object]
"""State dict of the optimizer, learning rate, RNG state: tensors, numbers and strings only (loaded without pickle)."""


@dataclass(frozen=True)
class CheckpointSnapshot:
    """All of a checkpoint, in host memory of its own."""

    model: ModelSnapshot
    tokenizer: PreTrainedTokenizerBase
    progress: Progress
    training_state: TrainingState

    def write(self, folder: Path) -> None:
        """Write the files into an empty folder. OSError: the disk refused; if it is full, the error says how much room
        there was, and how much is needed."""
        free_bytes = shutil.disk_usage(folder).free
        try:
            self.model.write(folder)
            self.tokenizer.save_pretrained(folder)
            card = model_card(CardFacts(self.model.config.to_dict(), self.progress))
            (folder / "README.md").write_text(card, encoding="utf-8")
            with (folder / TRAINING_STATE_FILE).open("wb") as file:  # given a path, torch hides why it failed
                torch.save(self.training_state, file)
            (folder / PROGRESS_FILE).write_text(self.progress.to_json(), encoding="utf-8")
        except Exception as error:
            if not is_disk_full(error):
                raise
            needed = f"it takes {self._size_bytes() / 1e6:,.0f} MB, of which {free_bytes / 1e6:,.0f} MB were free"
            raise OSError(errno.ENOSPC, needed, str(folder.parent)) from error

    def _size_bytes(self) -> int:
        """Of its tensors, which is nearly all."""
        model = self.model
        values = tree_leaves([model.tensors, model.trained, model.adapter, self.training_state])
        return sum(value.nbytes for value in values if isinstance(value, Tensor))


def take_snapshot(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress, training_state: TrainingState
) -> CheckpointSnapshot:
    """Copy everything that the next step changes. Other ranks of a sharded model call `snapshot_model` meanwhile."""
    state: TrainingState = tree_map_only(Tensor, host_copy, training_state)
    return CheckpointSnapshot(snapshot_model(model), tokenizer, progress, state)


def check_can_be_saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, contract: TokenContract) -> None:
    """Save all of a checkpoint but the numbers in a scratch folder, and read the tokenizer back.

    Called before the first step: what transformers refuses to save would be found at the first checkpoint, which loses
    the training before it.

    Raises:
        ValueError: a file cannot be saved, or the saved tokenizer has other tokens.
    """
    progress = Progress("", 0, 0, -1, -1, {}, contract)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            CheckpointSnapshot(snapshot_without_weights(model), tokenizer, progress, {}).write(folder)
            again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
            raise ValueError(
                f"the model or its tokenizer cannot be saved, so training would end at the first checkpoint: {error}"
            ) from error
        if (again.get_vocab(), again.eos_token_id) != (tokenizer.get_vocab(), tokenizer.eos_token_id):
            raise ValueError(
                "the tokenizer has other tokens once it is saved and read back, so a checkpoint would not belong to "
                "its model: save it with transformers' save_pretrained, check it, and name that folder"
            )


def read_training_state(checkpoint: Path) -> TrainingState:
    """Optimizer and RNG state of one checkpoint."""
    state: TrainingState = torch.load(checkpoint / TRAINING_STATE_FILE, map_location="cpu", weights_only=True)
    return state
