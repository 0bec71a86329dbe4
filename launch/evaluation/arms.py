"""The groups of rollouts that an evaluation makes of one checkpoint.

Always, three for a task with right answers, one (`sampled`) for a text task:

greedy     the most likely action each time. A token that was taken back is not offered there again, else a greedy
           policy that rejects its own choice would go round in circles.
sampled    temperature 1, as in training.
recovery   greedy, after a planted wrong first token: only an answer that takes it back can be right.

Then those that `evaluation.decoding` names; and of each, if asked for, a twin in which tokens that were taken back are
banned where they were not, and the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from actors.engine.settings import SamplingSettings
from actors.generator import PromptGroup
from actors.settings import RolloutSettings
from buffer.schema import TokenContract
from launch.evaluation.answer_metrics import plant_wrong_first_tokens
from launch.settings.decodings import GREEDY, RECOVERY, SAMPLED, ContrastiveSearch, Decoding
from launch.settings.evaluation import EvaluationSettings

if TYPE_CHECKING:
    from datasets import Dataset

    from buffer.experts.tasks import Task

BANNED, ALLOWED = ", banned", ", allowed"
"""What the name of a twin ends in: deleted tokens are banned, or allowed, contrary to what is usual."""


@dataclass(frozen=True, eq=False)
class Arm:
    """A group of rollouts. contrastive: they are searched for in the learner's model, not sampled by the engine."""

    name: str
    group: PromptGroup
    contrastive: ContrastiveSearch | None = None

    @property
    def is_planted(self) -> bool:
        """Whether the first token was forced, and wrong."""
        return self.group.planted is not None


def plan_arms(
    task: Task,
    contract: TokenContract,
    examples: Dataset,
    rollout: RolloutSettings,
    evaluation: EvaluationSettings,
    seed: int,
) -> list[Arm]:
    """The arms of the module's description, in the order of its lines."""
    prompts = [np.asarray(ids, dtype=np.int32) for ids in examples["prompt_ids"]]
    has_answers = task.is_correct is not None
    usual = [Decoding(SAMPLED)] + ([Decoding(GREEDY, temperature=0.0)] if has_answers else [])
    usual += [decoding for decoding in evaluation.decodings if decoding.name not in {each.name for each in usual}]
    arms = [Arm(each.name, PromptGroup(prompts, _sampling(each, rollout)), each.contrastive) for each in usual]
    if has_answers:
        planted = plant_wrong_first_tokens(examples, task.task_noise, contract, np.random.default_rng(seed))
        sampling = _sampling(Decoding(RECOVERY, temperature=0.0), rollout)
        arms.append(Arm(RECOVERY, PromptGroup(prompts, sampling, planted=[[token] for token in planted.tolist()])))
    if evaluation.ban_deleted == "both":
        arms += [twin for arm in arms for twin in _twin(arm)]
    return arms


def _sampling(decoding: Decoding, rollout: RolloutSettings) -> SamplingSettings:
    backspace = rollout.backspace and decoding.contrastive is None
    return SamplingSettings(
        max_new_tokens=rollout.max_new_tokens,
        max_actions=rollout.max_actions,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        backspace=backspace,
        ban_deleted=backspace and decoding.temperature == 0.0,
    )


def _twin(arm: Arm) -> list[Arm]:
    """The same with tokens that were taken back banned, or allowed; none where nothing can be taken back."""
    sampling = arm.group.sampling
    if not sampling.backspace:
        return []
    group = replace(arm.group, sampling=replace(sampling, ban_deleted=not sampling.ban_deleted))
    return [Arm(arm.name + (ALLOWED if sampling.ban_deleted else BANNED), group)]
