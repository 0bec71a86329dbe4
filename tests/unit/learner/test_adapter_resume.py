"""Training of adapters that is stopped and goes on from its checkpoint ends with the same weights, bit for bit."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from learner.checkpoints.checkpoint import load_weights, read_training_state
from learner.model.adapters import adapter_tensors, add_adapters, quantise_linear_layers
from learner.objectives import make_objective
from learner.publication import publication_tensors
from learner.settings.model import AdapterSettings
from learner.settings.stages import StageSettings
from learner.state_tree.policy import TreePolicy
from learner.trainer import Trainer
from tests.checkpoints import progress_at, save_checkpoint
from tests.random_logs import CLONING, MATCHING, TREES, RandomLogs
from tests.tiny_models import tiny_model
from tests.trajectories import BACKSPACE
from tests.unit.learner.test_model import word_tokenizer

STEPS, STOP_AT = 6, 4

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="the extra `qlora` (bitsandbytes) is not installed"
)


def adapted(*, quantised: bool, dtype: torch.dtype) -> PreTrainedModel:
    """As `load_policy` makes it in every process anew."""
    model = tiny_model(tied=True).to(dtype)
    if quantised:
        quantise_linear_layers(model)
    add_adapters(model, AdapterSettings(rank=4), base_name="tiny", revision=None, seed=0)
    return model


def make_trainer(model: PreTrainedModel, objective: dict[str, object], drawn: int = 0) -> Trainer:
    stage = StageSettings.model_validate(
        {
            "name": "s",
            "objective": objective,
            "steps": STEPS,
            "batch_size": 4,
            "rollout_batch_size": 4,
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
        }
    )
    rollouts = RandomLogs("policy", drawn) if objective is MATCHING else None
    experts = RandomLogs("expert", drawn)
    return Trainer(TreePolicy(model, BACKSPACE), make_objective(stage.objective), stage, TREES, experts, rollouts)


@pytest.mark.parametrize("objective", [CLONING, MATCHING], ids=lambda o: str(o["name"]))
@pytest.mark.parametrize(
    ("quantised", "dtype"),
    [
        (False, torch.float32),
        (False, torch.bfloat16),  # merged weights are rounded: they would not do to go on from
        pytest.param(True, torch.float32, marks=needs_bitsandbytes),
    ],
    ids=["float32", "bfloat16", "nf4"],
)
def test_stopping_and_going_on_changes_nothing(tmp_path: Path, objective, quantised, dtype):
    straight = adapted(quantised=quantised, dtype=dtype)
    trainer = make_trainer(straight, objective)
    losses = [trainer.train_step()["loss"] for _ in range(STEPS)]

    first = adapted(quantised=quantised, dtype=dtype)
    trainer = make_trainer(first, objective)
    found = [trainer.train_step()["loss"] for _ in range(STOP_AT)]
    path = save_checkpoint(tmp_path, first, word_tokenizer(), progress_at(trainer.step), trainer.state())

    second = adapted(quantised=quantised, dtype=dtype)
    trainer = make_trainer(second, objective, drawn=STOP_AT)
    load_weights(second, path)
    trainer.load_state(read_training_state(path))
    found += [trainer.train_step()["loss"] for _ in range(STEPS - STOP_AT)]

    assert found == losses
    assert losses[-1] != losses[0]
    for name, tensor in adapter_tensors(straight).items():
        assert torch.equal(adapter_tensors(second)[name], tensor), name
    again = dict(publication_tensors(second))
    assert all(torch.equal(again[name], tensor) for name, tensor in publication_tensors(straight))
