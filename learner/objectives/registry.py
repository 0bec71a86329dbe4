"""From the settings of an objective to the objective."""

from __future__ import annotations

from learner.objective_settings import LikelihoodSettings, SequenceMatchSettings
from learner.objectives.base import Objective
from learner.objectives.likelihood import Likelihood
from learner.objectives.sequencematch import SequenceMatch


def make_objective(settings: LikelihoodSettings | SequenceMatchSettings) -> Objective:
    """The objective that `settings` describe."""
    if isinstance(settings, LikelihoodSettings):
        return Likelihood(settings.name)
    return SequenceMatch(settings)
