"""A cost model that does not suit the model is told of before anything trains."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from launch.errors import UserError
from launch.run.checks import check_cost_models
from learner.settings.stages import StageSettings


def stages(cost_model: Path | None) -> list[StageSettings]:
    objectives = ({"name": "mle"}, {"name": "emo", "cost_model": None if cost_model is None else str(cost_model)})
    return [
        StageSettings.model_validate({"name": objective["name"], "objective": objective, "steps": 1})
        for objective in objectives
    ]


def test_a_cost_model_has_the_vocabulary_of_the_model(tmp_path: Path) -> None:
    LlamaConfig(vocab_size=40, hidden_size=16, num_attention_heads=2).save_pretrained(tmp_path)
    check_cost_models(stages(tmp_path), 40)
    check_cost_models(stages(None), 41)
    with pytest.raises(UserError, match=r"stage 'emo': cost_model '.*nothing' cannot be loaded"):
        check_cost_models(stages(tmp_path / "nothing"), 40)
    with pytest.raises(UserError, match=r"'emo': cost_model .* a vocabulary of 40 and the model one of 41: name"):
        check_cost_models(stages(tmp_path), 41)
