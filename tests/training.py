"""Short training on the arithmetic task without a run around it: stages, expert streams, hand-made rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedModel

from buffer.experts.stream import ExpertStream
from buffer.experts.tasks import Task
from buffer.settings import NoiseSettings
from buffer.trajectory.schema import trajectory_schema
from learner.batches import BatchSource
from learner.model.policy import load_policy
from learner.objectives import make_objective
from learner.settings.model import ScratchModelSettings
from learner.settings.stages import StageSettings
from learner.state_tree.batch import TreeSettings
from learner.state_tree.policy import TreePolicy
from learner.trainer import Trainer

SEED = 5
OPTIMIZER = {"learning_rate": 5e-3, "warmup_steps": 3}
CLONING = {"name": "behavior_cloning"}
MATCHING = {"name": "sequencematch", "alpha": 0.05, "bc_weight_start": 0.9, "bc_weight_end": 0.1, "bc_weight_steps": 8}


def make_model(task: Task, **changes) -> PreTrainedModel:
    """A small model for the task; changes: of its settings."""
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48, "max_positions": 40}
    return load_policy(ScratchModelSettings(**(sizes | changes)), task.tokenizer).model


def make_stage(objective: dict[str, object], steps: int = 12, **changes) -> StageSettings:
    """A stage of a few small steps."""
    return StageSettings.model_validate(
        {"name": "s", "objective": objective, "steps": steps, "batch_size": 8, "rollout_batch_size": 5}
        | {"optimizer": OPTIMIZER}
        | changes
    )


def make_stream(task: Task, noise: float = 0.3) -> ExpertStream:
    """expert trajectories with wrong digits taken back; noise: their share."""
    settings = NoiseSettings(kind="task", rate=noise) if noise else NoiseSettings(kind="none", rate=0.0)
    return task.expert_stream(settings, task.contract(), SEED)


def make_trees(task: Task) -> TreeSettings:
    """Small enough for several micro-batches a step."""
    return TreeSettings(
        backspace_id=task.backspace_id, eos_id=task.eos_id, max_tokens_per_micro_batch=64, max_positions=40
    )


@dataclass
class HandMadeRollouts:
    """Policy rows as an actor would write them: a wrong digit taken back, in a cycle; keeps what it was asked."""

    task: Task
    answers: tuple[str, ...] = ("12<3", "7", "45<<6")
    next_row: int = 0
    counts: list[int] = field(default_factory=list)

    def sample(self, count: int) -> pa.RecordBatch:
        self.counts.append(count)
        rows = [self._row(self.next_row + i) for i in range(count)]
        self.next_row += count
        return pa.RecordBatch.from_pylist(rows, schema=trajectory_schema(self.task.contract()))

    def _row(self, serial: int) -> dict[str, object]:
        prompts = self.task.train["prompt_ids"]
        answer = self.answers[serial % len(self.answers)]
        vocabulary = self.task.tokenizer.get_vocab()
        actions = [self.task.backspace_id if character == "<" else vocabulary[character] for character in answer]
        actions += [self.task.eos_id]
        return {
            "id": f"a/{serial}",
            "source": "policy",
            "task": self.task.name,
            "prompt_ids": list(prompts[serial % len(prompts)]),
            "actions": actions,
            "logprobs": [-1.0] * len(actions),
            "policy_version": [0] * len(actions),
            "finish_reason": "eos",
            "sampling": {"temperature": 1.0, "top_p": 1.0, "backspace": True},
            "actor": "a",
            "created_at": datetime.now(UTC),
        }


def make_trainer(
    task: Task,
    model: PreTrainedModel,
    stage: StageSettings,
    experts: BatchSource | None = None,
    rollouts: BatchSource | None = None,
) -> Trainer:
    """A trainer on expert trajectories of the task, and on hand-made rollouts where the objective needs some."""
    objective = make_objective(stage.objective)
    if objective.settings.needs_rollouts and rollouts is None:
        rollouts = HandMadeRollouts(task)
    policy = TreePolicy(model, task.backspace_id)
    return Trainer(policy, objective, stage, make_trees(task), experts or make_stream(task), rollouts)


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """A copy that training leaves alone."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_bit_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, and the same bits under each."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def train(trainer: Trainer, steps: int) -> list[dict[str, float]]:
    """Take steps; gives the metrics of each."""
    return [trainer.train_step() for _ in range(steps)]


def check_resume(
    task: Task, make: Callable[[PreTrainedModel, int], Trainer], steps: int, stop_at: Sequence[int], folder: Path
) -> list[dict[str, float]]:
    """`steps` in a row == some steps, a state on disk, fresh objects and the rest, bit for bit; gives the metrics.

    make: a trainer of a model, whose sources of data go on from that step.
    """
    straight = make_model(task, seed=3)
    metrics = train(make(straight, 0), steps)
    for stop in stop_at:
        first, second = make_model(task, seed=3), make_model(task, seed=4)
        trainer = make(first, 0)
        train(trainer, stop)
        torch.save(trainer.state(), folder / "state.pt")
        second.load_state_dict(first.state_dict())
        trainer = make(second, stop)
        trainer.load_state(torch.load(folder / "state.pt", weights_only=True))
        rest = train(trainer, steps - stop)
        assert [row["loss"] for row in rest] == [row["loss"] for row in metrics[stop:]]
        assert_bit_identical(weights_of(second), weights_of(straight))
    return metrics
