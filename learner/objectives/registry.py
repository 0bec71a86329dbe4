"""From the settings of an objective to the objective."""

from __future__ import annotations

from torch import Tensor
from transformers import AutoModelForCausalLM

from learner.objective_settings import (
    EmoSettings,
    LikelihoodSettings,
    ObjectiveSettings,
    ScheduledSamplingSettings,
    UnlikelihoodSettings,
)
from learner.objectives.base import Objective
from learner.objectives.emo import Emo
from learner.objectives.likelihood import Likelihood
from learner.objectives.scheduled_sampling import ScheduledSampling
from learner.objectives.sequencematch import SequenceMatch
from learner.objectives.unlikelihood import Unlikelihood


def make_objective(settings: ObjectiveSettings) -> Objective:
    """The objective that `settings` describe.

    Raises:
        ValueError: the model that they name cannot be loaded.
    """
    if isinstance(settings, LikelihoodSettings):
        return Likelihood(settings.name)
    if isinstance(settings, UnlikelihoodSettings):
        return Unlikelihood(settings)
    if isinstance(settings, EmoSettings):
        return Emo(settings, None if settings.cost_model is None else _output_embedding(settings.cost_model))
    if isinstance(settings, ScheduledSamplingSettings):
        return ScheduledSampling(settings)
    return SequenceMatch(settings)


def _output_embedding(name: str) -> Tensor:
    """[V, d] of a model in the Hugging Face format; the rest of the model is let go."""
    try:
        model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, use_safetensors=True)
    except OSError as error:
        raise ValueError(f"cost_model {name!r} cannot be loaded: {error}") from error
    table: Tensor = model.get_output_embeddings().weight.detach().clone()
    return table
