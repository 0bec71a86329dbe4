"""From the settings of an objective to the objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import AutoModelForCausalLM

from learner.objectives.adversarial_js import AdversarialJs
from learner.objectives.base import Objective
from learner.objectives.emo import Emo
from learner.objectives.likelihood import Likelihood
from learner.objectives.reward_rules import RewardRule
from learner.objectives.scheduled_sampling import ScheduledSampling
from learner.objectives.score_function import ScoreFunction
from learner.objectives.sequencematch import SequenceMatch
from learner.objectives.target_rules import (
    Constraint,
    TargetRule,
    f_policy_gradient,
    policy_gradient,
    policy_gradient_with_baseline,
)
from learner.objectives.unlikelihood import Unlikelihood
from learner.ranks.group import Ranks
from learner.settings.objectives import (
    AdversarialJsSettings,
    EmoSettings,
    ExpertObjectiveSettings,
    FDpgSettings,
    GdcSettings,
    KlControlSettings,
    LikelihoodSettings,
    ObjectiveSettings,
    ScheduledSamplingSettings,
    ScoreFunctionSettings,
    TargetSettings,
    UnlikelihoodSettings,
)
from learner.state_tree.policy import TreePolicy


def make_objective(
    settings: ObjectiveSettings,
    ranks: Ranks | None = None,
    load_base: Callable[[], TreePolicy] | None = None,
    features: Sequence[str] = (),
) -> Objective:
    """The objective that `settings` describe.

    Args:
        ranks: that train with it; None = this process alone.
        load_base: gives the policy as it is at the start of the stage, frozen; called where it is needed.
        features: names of those that rollouts have, in their order.

    Raises:
        ValueError: the model that they name cannot be loaded.
    """
    if isinstance(settings, LikelihoodSettings):
        return Likelihood(settings.name)
    if isinstance(settings, ExpertObjectiveSettings):
        return _token_objective(settings)
    if isinstance(settings, AdversarialJsSettings):
        return AdversarialJs(settings, ranks or Ranks())
    if isinstance(settings, ScoreFunctionSettings):
        return _score_function(settings, ranks or Ranks(), load_base, features)
    return SequenceMatch(settings)


def _token_objective(settings: ExpertObjectiveSettings) -> Objective:
    if isinstance(settings, UnlikelihoodSettings):
        return Unlikelihood(settings)
    if isinstance(settings, EmoSettings):
        return Emo(settings, None if settings.cost_model is None else _output_embedding(settings.cost_model))
    assert isinstance(settings, ScheduledSamplingSettings)
    return ScheduledSampling(settings)


def _score_function(
    settings: ScoreFunctionSettings,
    ranks: Ranks,
    load_base: Callable[[], TreePolicy] | None,
    features: Sequence[str],
) -> ScoreFunction:
    base = None
    if settings.needs_base_model:
        assert load_base is not None, f"{settings.name} compares with the policy at the start of the stage"
        base = load_base()
    if isinstance(settings, TargetSettings):
        return ScoreFunction(settings.name, _target_rule(settings, features), ranks, base)
    rule = RewardRule(settings.beta if isinstance(settings, KlControlSettings) else 0.0)
    return ScoreFunction(settings.name, rule, ranks, base)


def _target_rule(settings: TargetSettings, features: Sequence[str]) -> TargetRule:
    if isinstance(settings, FDpgSettings):
        advantage = f_policy_gradient(settings.divergence)
    else:
        advantage = policy_gradient_with_baseline if settings.name == "gdc_pp" else policy_gradient
    constraints = tuple(
        Constraint(each.feature, features.index(each.feature), each.target) for each in settings.constraints
    )
    is_adaptive = isinstance(settings, GdcSettings) and settings.proposal == "kl_adaptive"
    return TargetRule(constraints, advantage, settings.fit_samples, is_adaptive)


def _output_embedding(name: str) -> Tensor:
    """[V, d] of a model in the Hugging Face format; the rest of the model is let go."""
    try:
        model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, use_safetensors=True)
    except OSError as error:
        raise ValueError(f"cost_model {name!r} cannot be loaded: {error}") from error
    table: Tensor = model.get_output_embeddings().weight.detach().clone()
    return table
