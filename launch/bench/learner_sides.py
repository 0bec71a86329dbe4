"""The trainers that are compared: each does a number of optimizer steps on a load and says how long they took.

The same weights, batches, AdamW, learning rate and clipping everywhere; nothing is logged, saved or evaluated.
"""

from __future__ import annotations

import copy
import tempfile
import time
from typing import Literal, NamedTuple, Protocol

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

from launch.bench.learner_load import LoadSource, TrainingLoad
from launch.bench.tiny_llama import BACKSPACE_ID, EOS_ID
from learner.batches.micro_batches import TreeSettings
from learner.objectives.registry import make_objective
from learner.settings.objectives import LikelihoodSettings
from learner.settings.stages import OptimizerSettings, StageSettings
from learner.state_tree.policy import TreePolicy
from learner.trainer import Trainer

LEARNING_RATE = 1e-4

SideName = Literal["ours", "hf_trainer", "trl_sft"]


class Moment(NamedTuple):
    """A point in time, or what lies between two. cpu_s: of this process; says more than wall_s on a busy machine."""

    wall_s: float
    cpu_s: float

    @classmethod
    def now(cls) -> Moment:
        """The present."""
        return cls(time.perf_counter(), time.process_time())

    def since(self, earlier: Moment) -> Moment:
        """What lies between."""
        return Moment(self.wall_s - earlier.wall_s, self.cpu_s - earlier.cpu_s)


class Side(Protocol):
    """One trainer with its own copy of the model. loss: mean per trained token over the newest run."""

    loss: float

    def run(self, steps: int) -> Moment:
        """What `steps` steps took, after one that does not count; from the first row of the load."""
        ...


class OurSide:
    """`learner.trainer.Trainer` with maximum likelihood."""

    def __init__(self, model: PreTrainedModel, load: TrainingLoad, max_nodes_per_batch: int) -> None:
        stage = StageSettings(
            name="bench",
            objective=LikelihoodSettings(name="mle"),
            steps=10**9,
            batch_size=load.batch,
            optimizer=OptimizerSettings(learning_rate=LEARNING_RATE, warmup_steps=0, schedule="constant"),
        )
        self._source = LoadSource(load.trajectories(model.config.vocab_size))
        self._trainer = Trainer(
            TreePolicy(copy.deepcopy(model), BACKSPACE_ID),
            make_objective(stage.objective),
            stage,
            TreeSettings(BACKSPACE_ID, EOS_ID, max_nodes_per_batch, max_positions=load.length),
            self._source,
            None,
        )
        self.loss = float("nan")
        self.sharing_ratio = float("nan")
        self.padding_share = float("nan")

    def run(self, steps: int) -> Moment:
        """See `Side`."""
        self._source.rewind()
        metrics = [self._trainer.train_step()]
        started = Moment.now()
        metrics += [self._trainer.train_step() for _ in range(steps)]
        elapsed = Moment.now().since(started)
        self.loss = sum(row["loss"] for row in metrics) / len(metrics)
        self.sharing_ratio = metrics[-1]["sharing_ratio"]
        self.padding_share = metrics[-1]["padding_share"]
        return elapsed


class _StepTimes(TrainerCallback):  # type: ignore[misc]
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[Moment] = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.ends.append(Moment.now())


class LibrarySide:
    """Hugging Face's `Trainer`, or TRL's `SFTTrainer`."""

    def __init__(self, model: PreTrainedModel, load: TrainingLoad, name: Literal["hf_trainer", "trl_sft"]) -> None:
        columns = {"input_ids": load.ids.tolist(), "labels": load.labels.tolist()}
        self._folder = tempfile.TemporaryDirectory()
        self._times = _StepTimes()
        optimizer = OptimizerSettings()
        settings: dict[str, object] = {
            "output_dir": self._folder.name,
            "per_device_train_batch_size": load.batch,
            "max_steps": 1,
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
        make = _make_hugging_face_trainer if name == "hf_trainer" else _make_trl_trainer
        self._trainer = make(copy.deepcopy(model), settings, Dataset.from_dict(columns), self._times)
        self._trainer.remove_callback(PrinterCallback)
        self.loss = float("nan")

    def run(self, steps: int) -> Moment:
        """See `Side`."""
        self._times.ends.clear()
        self._trainer.args.max_steps = steps + 1
        self.loss = float(self._trainer.train().training_loss)
        assert len(self._times.ends) == steps + 1
        return self._times.ends[-1].since(self._times.ends[0])


def _make_hugging_face_trainer(
    model: PreTrainedModel, settings: dict[str, object], dataset: Dataset, times: _StepTimes
) -> HuggingFaceTrainer:
    return HuggingFaceTrainer(
        model,
        TrainingArguments(**settings),
        data_collator=default_data_collator,
        train_dataset=dataset,
        callbacks=[times],
    )


def _make_trl_trainer(
    model: PreTrainedModel, settings: dict[str, object], dataset: Dataset, times: _StepTimes
) -> HuggingFaceTrainer:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    # Nothing is tokenised; the trainer wants a padding token to know.
    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": EOS_ID}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    config = SFTConfig(**settings, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    return SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer, callbacks=[times])
