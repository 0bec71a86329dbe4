"""The groups of rollouts that an evaluation makes of one checkpoint.

Always, for a task with right answers all three, for a text task the last two:

greedy     the most likely action each time. A token that was taken back is not offered there again, else a greedy
           policy that rejects its own choice would go round in circles.
sampled    temperature 1, as in training.
recovery   after a planted wrong first token, which has to be taken back: answers greedy, texts at temperature 1. Not
           where `recovery_obstacle` gives a reason.

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
from buffer.trajectory.schema import TokenContract
from launch.evaluation.planting import lacks_wrong_tokens, plant_wrong_tokens
from launch.settings.decodings import GREEDY, RECOVERY, SAMPLED, ContrastiveSearch, Decoding, check_planting
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
    def num_planted(self) -> int:
        """How many tokens each answer begins with that were forced; the first is wrong."""
        return len(self.group.planted[0]) if self.group.planted else 0


def recovery_obstacle(task: Task, contract: TokenContract, examples: Dataset, rollout: RolloutSettings) -> str | None:
    """Why these examples cannot be made to begin with a wrong token; None where they can."""
    if rollout.max_new_tokens == 1:
        return "actors.rollout.max_new_tokens=1 leaves no room for an answer behind a forced token"
    return lacks_wrong_tokens(examples, task.task_noise, contract)


def plan_arms(
    task: Task,
    contract: TokenContract,
    examples: Dataset,
    rollout: RolloutSettings,
    evaluation: EvaluationSettings,
    seed: int,
) -> list[Arm]:
    """The arms of the module's description, in the order of its lines.

    Raises:
        ValueError: see `check_planting`.
    """
    has_answers = task.is_correct is not None
    check_planting(evaluation.decodings, rollout.max_new_tokens)
    prompts = [np.asarray(ids, dtype=np.int32) for ids in examples["prompt_ids"]]
    usual = [Decoding(SAMPLED)] + ([Decoding(GREEDY, temperature=0.0)] if has_answers else [])
    usual += [decoding for decoding in evaluation.decodings if decoding.name not in {each.name for each in usual}]
    usual.append(Decoding(RECOVERY, temperature=0.0, num_planted=1))
    if not has_answers:
        usual = [replace(decoding, temperature=1.0) if decoding.num_planted else decoding for decoding in usual]
    if recovery_obstacle(task, contract, examples, rollout) is not None:
        usual = [decoding for decoding in usual if not decoding.num_planted]
    arms: list[Arm] = []
    for decoding in usual:
        planted = None
        if decoding.num_planted:
            rng = np.random.default_rng(seed)
            planted = plant_wrong_tokens(examples, task.task_noise, contract, decoding.num_planted, rng).tolist()
        group = PromptGroup(prompts, _sampling(decoding, rollout), planted=planted)
        arms.append(Arm(decoding.name, group, decoding.contrastive))
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
