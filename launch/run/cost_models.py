"""Models that give a stage its costs (`emo`): whether they suit the model that is trained, before it trains."""

from __future__ import annotations

from collections.abc import Sequence

from launch.errors import UserError
from learner.settings.objectives import EmoSettings
from learner.settings.stages import StageSettings


def check_cost_models(stages: Sequence[StageSettings], vocab_size: int) -> None:
    """Read the configuration of every cost model that a stage names. vocab_size: of the model that is trained.

    Raises:
        UserError: there is none, or it has another vocabulary.
    """
    for stage in stages:
        if not isinstance(stage.objective, EmoSettings) or stage.objective.cost_model is None:
            continue
        name = stage.objective.cost_model
        found = _vocab_size(stage.name, name)
        if found != vocab_size:
            raise UserError(
                f"stage {stage.name!r}: cost_model {name!r} has a vocabulary of {found} and the model one of "
                f"{vocab_size}: name one with the same tokenizer, or leave it out to use the model's own embedding"
            )


def _vocab_size(stage: str, name: str) -> int:
    from transformers import AutoConfig

    try:
        size: int = AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config().vocab_size
    except (OSError, ValueError) as error:
        raise UserError(f"stage {stage!r}: cost_model {name!r} cannot be loaded: {error}") from None
    return size
