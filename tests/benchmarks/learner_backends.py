"""The trainers that are compared: each does a number of optimizer steps on the same texts.

The same weights, batches, AdamW, learning rate and clipping everywhere; nothing is logged, saved or evaluated.
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from datasets import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers import Trainer as HuggingFaceTrainer

from launch.errors import UserError
from learner.objectives import make_objective
from learner.settings.objectives import LikelihoodSettings
from learner.settings.stages import OptimizerSettings, StageSettings
from learner.state_tree.batch import TreeSettings
from learner.state_tree.policy import TreePolicy
from learner.trainer import Trainer
from tests.benchmarks.backend import Timed
from tests.benchmarks.models import BACKSPACE_ID, EOS_ID, FIRST_TEXT_ID, contract_of
from tests.trajectories import batch_of, expert_row

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Load:
    """Texts of equal length, so that no trainer pads: the hardest case to beat. None has a backspace, so every trainer
    has the same tokens.

    ids: [texts, length] prompt and answer, which ends with `<eos>`. steps: that are measured, of `batch` texts each, in
    order; there is one more, which does not count.
    """

    ids: npt.NDArray[np.int32]
    prompt_length: int
    batch: int
    steps: int

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """[texts, length] of the libraries that we compare with: -100 is not trained."""
        labels = self.ids.copy()
        labels[:, : self.prompt_length] = -100
        return labels

    def trajectories(self, vocab_size: int) -> pa.RecordBatch:
        """The same as expert trajectories."""
        split = self.prompt_length
        rows = [
            expert_row(f"bench/{number}", text[split:], prompt_ids=text[:split], finish_reason="eos")
            for number, text in enumerate(self.ids.tolist())
        ]
        return batch_of(rows, contract_of(vocab_size))

    def timed(self, wall_s: float, cpu_s: float) -> dict[str, Timed]:
        """The measured steps: `actions`, trained tokens; `nodes`, all tokens."""
        texts, length = self.steps * self.batch, self.ids.shape[1]
        return {
            "actions": Timed(texts * (length - self.prompt_length), wall_s, cpu_s),
            "nodes": Timed(texts * length, wall_s, cpu_s),
        }


def make_load(
    *, batch: int, length: int, prompt_length: int, texts_per_prompt: int, vocab_size: int, steps: int, seed: int
) -> Load:
    """Random texts; `texts_per_prompt` in a row share their prompt.

    Raises:
        UserError: a batch does not hold whole groups, or a text holds no prompt and answer.
    """
    if batch % texts_per_prompt or not 0 < prompt_length < length:
        raise UserError(
            f"batch={batch} must be a multiple of {texts_per_prompt} and the text longer than its prompt "
            f"({length}, {prompt_length}); choose other sizes"
        )
    generator = np.random.default_rng(seed)
    ids = generator.integers(FIRST_TEXT_ID, vocab_size, (batch * (steps + 1), length), dtype=np.int32)
    ids[:, :prompt_length] = np.repeat(ids[::texts_per_prompt, :prompt_length], texts_per_prompt, axis=0)
    ids[:, -1] = EOS_ID
    return Load(ids, prompt_length, batch, steps)


class LoadSource:
    """A `learner.batches.BatchSource` that gives trajectories in order, from `next` on."""

    def __init__(self, trajectories: pa.RecordBatch) -> None:
        self._trajectories = trajectories
        self.next = 0

    def sample(self, count: int) -> pa.RecordBatch:
        """The next `count` trajectories."""
        self.next += count
        return self._trajectories.slice(self.next - count, count)


class OurBackend:
    """`learner.trainer.Trainer` with maximum likelihood, on its own copy of the model.

    first_loss: mean per trained token over the first measurement.
    """

    def __init__(self, model: PreTrainedModel, load: Load, max_tokens_per_micro_batch: int) -> None:
        stage = StageSettings(
            name="bench",
            objective=LikelihoodSettings(name="mle"),
            steps=10**9,
            batch_size=load.batch,
            optimizer=OptimizerSettings(learning_rate=LEARNING_RATE, warmup_steps=0, schedule="constant"),
        )
        self._load = load
        self._source = LoadSource(load.trajectories(model.config.vocab_size))
        self._trainer = Trainer(
            TreePolicy(copy.deepcopy(model), BACKSPACE_ID),
            make_objective(stage.objective),
            stage,
            TreeSettings(BACKSPACE_ID, EOS_ID, max_tokens_per_micro_batch, max_positions=load.ids.shape[1]),
            self._source,
            None,
        )
        self.first_loss = self.sharing_ratio = self.padding_fraction = float("nan")

    def measure(self) -> dict[str, Timed]:
        """All steps from the first text of the load; the first does not count."""
        self._source.next = 0
        rows = [self._trainer.train_step()]
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        rows += [self._trainer.train_step() for _ in range(self._load.steps)]
        timed = self._load.timed(time.perf_counter() - wall_s, time.process_time() - cpu_s)
        if math.isnan(self.first_loss):
            self.first_loss = sum(row["loss"] for row in rows) / len(rows)
        self.sharing_ratio, self.padding_fraction = rows[-1]["sharing_ratio"], rows[-1]["padding_fraction"]
        return timed


class _StepEnds(TrainerCallback):  # type: ignore[misc]
    """When each step ended, by both clocks."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))


class LibraryBackend:
    """Hugging Face's `Trainer`, or TRL's `SFTTrainer`; see `OurBackend`."""

    def __init__(self, model: PreTrainedModel, load: Load, name: Literal["hf_trainer", "trl_sft"]) -> None:
        self._load = load
        self._folder = tempfile.TemporaryDirectory()
        self._ends = _StepEnds()
        optimizer = OptimizerSettings()
        settings: dict[str, object] = {
            "output_dir": self._folder.name,
            "per_device_train_batch_size": load.batch,
            "max_steps": load.steps + 1,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch_fused",
            "adam_beta1": optimizer.betas[0],
            "adam_beta2": optimizer.betas[1],
            "weight_decay": optimizer.weight_decay,
            "max_grad_norm": optimizer.max_grad_norm,
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": not torch.cuda.is_available(),
            "dataloader_pin_memory": torch.cuda.is_available(),
        }
        dataset = Dataset.from_dict({"input_ids": load.ids.tolist(), "labels": load.labels.tolist()})
        make = _hugging_face_trainer if name == "hf_trainer" else _trl_trainer
        self._trainer = make(copy.deepcopy(model), settings, train_dataset=dataset, callbacks=[self._ends])
        self._trainer.remove_callback(PrinterCallback)
        self.first_loss = float("nan")

    def measure(self) -> dict[str, Timed]:
        """See `OurBackend`."""
        self._ends.ends.clear()
        loss = float(self._trainer.train().training_loss)
        if math.isnan(self.first_loss):
            self.first_loss = loss
        first, *_, last = self._ends.ends
        assert len(self._ends.ends) == self._load.steps + 1
        return self._load.timed(last[0] - first[0], last[1] - first[1])


def _hugging_face_trainer(model: PreTrainedModel, settings: dict[str, object], **common: object) -> HuggingFaceTrainer:
    return HuggingFaceTrainer(model, TrainingArguments(**settings), data_collator=default_data_collator, **common)


def _trl_trainer(model: PreTrainedModel, settings: dict[str, object], **common: object) -> HuggingFaceTrainer:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    # Nothing is tokenized; the trainer wants a padding token to know.
    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": EOS_ID}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    config = SFTConfig(**settings, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    return SFTTrainer(model, config, processing_class=tokenizer, **common)
