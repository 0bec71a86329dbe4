"""The groups of rollouts that an evaluation makes of one checkpoint; docs/evaluation.md lists them.

In greedy decoding a token that was taken back is not offered again at its text, else a greedy policy that rejects its
own choice would go round in circles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from actors.engine.interface import SamplingSettings
from actors.generator import PromptGroup
from actors.settings import RolloutSettings
from buffer.experts.noise import Float64, NoiseCandidates
from buffer.experts.ragged import Int32, Int64, Ragged
from buffer.trajectory.schema import TokenContract
from launch.settings.evaluation import (
    GREEDY,
    RECOVERY,
    SAMPLED,
    ContrastiveSearch,
    Decoding,
    EvaluationSettings,
    check_planting,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from buffer.experts.tasks import Task


@dataclass(frozen=True, eq=False)
class RolloutGroup:
    """One way to decode every example. contrastive: searched for in the learner's model, not sampled by the engine."""

    name: str
    group: PromptGroup
    contrastive: ContrastiveSearch | None = None

    @property
    def num_forced(self) -> int:
        """How many tokens each answer begins with that were forced; the first is wrong."""
        return len(self.group.planted[0]) if self.group.planted else 0


def recovery_obstacle(task: Task, contract: TokenContract, examples: Dataset, rollout: RolloutSettings) -> str | None:
    """Why these examples cannot be made to begin with a wrong token; None where they can."""
    if rollout.max_new_tokens == 1:
        return "actors.rollout.max_new_tokens=1 leaves no room for an answer behind a forced token"
    choices = _choices(examples, task.task_noise, contract, wrong=True)
    lacking = sum(len(rows) for rows, ids, _ in choices if len(ids) == 0)
    return f"{lacking} of {len(examples)} examples have no plausible wrong token to begin with" if lacking else None


def plan_groups(
    task: Task,
    contract: TokenContract,
    examples: Dataset,
    rollout: RolloutSettings,
    evaluation: EvaluationSettings,
    seed: int,
) -> list[RolloutGroup]:
    """The usual groups, and those that the settings ask for. Raises ValueError as `check_planting` does."""
    has_answers = task.is_correct is not None
    check_planting(evaluation.decodings, rollout.max_new_tokens)
    prompts = [np.asarray(ids, dtype=np.int32) for ids in examples["prompt_ids"]]
    usual = [Decoding(SAMPLED)] + ([Decoding(GREEDY, temperature=0.0)] if has_answers else [])
    usual += [decoding for decoding in evaluation.decodings if decoding.name not in {each.name for each in usual}]
    can_recover = recovery_obstacle(task, contract, examples, rollout) is None
    groups = []
    for decoding in [*usual, Decoding(RECOVERY, temperature=0.0, num_planted=1)]:
        forced = None
        if decoding.num_planted:
            if not can_recover:
                continue
            rng = np.random.default_rng(seed)
            forced = wrong_tokens(examples, task.task_noise, contract, decoding.num_planted, rng).tolist()
        temperature = 1.0 if decoding.num_planted and not has_answers else decoding.temperature
        backspace = rollout.backspace and decoding.contrastive is None
        sampling = SamplingSettings(
            max_new_tokens=rollout.max_new_tokens,
            max_actions=rollout.max_actions,
            temperature=temperature,
            top_p=decoding.top_p,
            backspace=backspace,
            ban_deleted=backspace and temperature == 0.0,
        )
        groups.append(RolloutGroup(decoding.name, PromptGroup(prompts, sampling, forced), decoding.contrastive))
    if evaluation.ban_deleted == "both":
        for each in [each for each in groups if each.group.sampling.backspace]:
            sampling = each.group.sampling
            group = replace(each.group, sampling=replace(sampling, ban_deleted=not sampling.ban_deleted))
            groups.append(RolloutGroup(each.name + (", allowed" if sampling.ban_deleted else ", banned"), group))
    return groups


def wrong_tokens(
    examples: Dataset, candidates: NoiseCandidates, contract: TokenContract, count: int, rng: np.random.Generator
) -> Int32:
    """[R, count] plausible tokens for each example; the first differs from the reference's, so that all are mistakes.

    Raises ValueError where an example has no candidate (see `recovery_obstacle`).
    """
    tokens = np.empty((len(examples), count), dtype=np.int32)
    for column in range(count):
        for rows, ids, chances in _choices(examples, candidates, contract, wrong=column == 0):
            if len(ids) == 0:
                raise ValueError(f"example {rows[0]} has no candidate for a wrong token")
            tokens[rows, column] = rng.choice(ids, len(rows), p=chances)
    return tokens


def references(examples: Dataset) -> Ragged:
    """The tokens of the right answers, or of the held-out continuations."""
    return Ragged.from_arrow(examples.select_columns(["target_ids"]).with_format("arrow")[:].column("target_ids"))


def first_targets(examples: Dataset) -> Int32:
    """[R] the first token of each reference."""
    right = references(examples)
    return right.values[right.offsets[:-1]]


def _choices(
    examples: Dataset, candidates: NoiseCandidates, contract: TokenContract, *, wrong: bool
) -> Iterator[tuple[Int64, Int32, Float64]]:
    """Rows of examples with the same plausible tokens; those tokens, and the chances of each.

    wrong: without the first token of the reference.
    """
    special = [*contract.eos_ids, contract.backspace_id]
    refused = first_targets(examples) if wrong else np.full(len(examples), special[0], dtype=np.int32)
    keys = np.stack([np.asarray(examples["noise_group"], dtype=np.int64), refused])
    pairs, key_of_row = np.unique(keys, axis=1, return_inverse=True)
    for index, (group, token) in enumerate(pairs.T.tolist()):
        ids, chances = candidates.others(group, [*special, token])
        yield np.flatnonzero(key_of_row == index), ids, chances
