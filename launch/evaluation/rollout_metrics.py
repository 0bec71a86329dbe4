"""Numbers of rollouts, each with its standard error; docs/evaluation.md lists them.

A batch holds one rollout per example, in their order.

A token is judged if the text before it, at the moment it is appended, is a prefix of the reference answer. It is right
if it is the reference's next token there, else wrong. What follows a mistake is neither; nor is `<eos>`, which nothing
can take back. A token counts as taken back if it is gone at the end, whichever backspace removed it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from buffer.experts.ragged import Ragged
from buffer.experts.tasks import Task
from buffer.trajectory.replay import ActionLogs, Replay, replay, surviving_events
from buffer.trajectory.schema import TokenContract
from launch.evaluation.rollout_groups import first_targets, references
from launch.evaluation.text_statistics import distinct_ngrams, diversity, ngram_entropy, self_bleu
from launch.statistics import Bool, Estimate, Int64

if TYPE_CHECKING:
    from datasets import Dataset

ENTROPY_SIZES = (1, 2, 4)


@dataclass(frozen=True)
class ReplayedRollouts:
    """L rollouts with A actions, and what their replay says."""

    batch: pa.RecordBatch
    contract: TokenContract
    logs: ActionLogs
    played: Replay

    @classmethod
    def of(cls, batch: pa.RecordBatch, contract: TokenContract) -> ReplayedRollouts:
        """The rollouts of a batch of trajectories."""
        logs = ActionLogs.from_batch(batch)
        return cls(batch, contract, logs, replay(logs, contract.backspace_id))

    @cached_property
    def survives(self) -> Bool:
        """[A] whether the token that an action appended is there at the end."""
        return surviving_events(self.logs, self.played, self.contract.backspace_id)

    @cached_property
    def texts(self) -> Ragged:
        """What remains of each rollout, without `<eos>`."""
        kept = self.survives & ~np.isin(self.logs.realised, self.contract.eos_ids)
        lengths = np.bincount(self.played.log[kept], minlength=self.logs.num_logs)
        return Ragged.from_lengths(lengths, self.logs.realised[kept])

    def ended_by(self, reason: str) -> Bool:
        """[L] whether a rollout has this finish reason."""
        ended: Bool = np.array(self.batch.column("finish_reason").to_pylist()) == reason
        return ended

    def fraction_of(self, cases: Bool, actions: Bool | Int64) -> Estimate:
        """How often `cases` [A] are true of these actions."""
        return Estimate.fraction(cases[actions], self.played.log[actions], self.logs.num_logs)

    def forced_taken_back(self, num_forced: int) -> tuple[Bool, Estimate]:
        """[L] whether all tokens that were forced as first actions are gone at the end; how many of them are.

        Raises ValueError where a rollout is too short to hold them.
        """
        if (self.logs.lengths < num_forced).any():
            raise ValueError(f"a rollout is shorter than the {num_forced} tokens that were forced in it")
        forced = self.logs.offsets[:-1, None] + np.arange(num_forced)
        return np.logical_and.reduce(~self.survives[forced], axis=1), self.fraction_of(~self.survives, forced.ravel())

    def decoded(self, task: Task) -> list[str]:
        """The final text of each rollout."""
        texts: list[str] = task.tokenizer.batch_decode([ids.tolist() for ids in self.texts.rows()])
        return texts


def answer_metrics(
    rollouts: ReplayedRollouts, examples: Dataset, task: Task, num_forced: int = 0
) -> dict[str, Estimate]:
    """All numbers of answers, the first `num_forced` tokens of each forced, and the first of those wrong.

    Raises ValueError where the rollouts are not those of the examples, or the task has no right answers.
    """
    correct = Estimate.fraction(_correct(rollouts, examples, task))
    if num_forced:
        _, taken_back = rollouts.forced_taken_back(num_forced)
        if (rollouts.logs.realised[rollouts.logs.offsets[:-1]] == first_targets(examples)).any():
            raise ValueError("a rollout begins with the right token: recovery is measured from a wrong one")
        return {"recovery": correct, "planted_taken_back": taken_back}
    judged, right = _judge_tokens(rollouts, references(examples))
    return {
        "accuracy": correct,
        "empty_rate": Estimate.fraction(rollouts.texts.lengths == 0),
        "actions_per_answer": Estimate.mean(rollouts.logs.lengths),
        **_editing_metrics(rollouts),
        "wrong_taken_back": rollouts.fraction_of(~rollouts.survives, judged & ~right),
        "right_taken_back": rollouts.fraction_of(~rollouts.survives, judged & right),
    }


def text_metrics(rollouts: ReplayedRollouts, num_forced: int = 0) -> dict[str, Estimate]:
    """All numbers of generated texts, the first `num_forced` tokens of each forced; ValueError if one is shorter."""
    texts = rollouts.texts
    recovered = {}
    if num_forced:
        all_gone, taken_back = rollouts.forced_taken_back(num_forced)
        recovered = {"recovery": Estimate.fraction(all_gone), "planted_taken_back": taken_back}
    return {
        **recovered,
        **_editing_metrics(rollouts),
        "tokens_per_text": Estimate.mean(texts.lengths),
        "distinct_4grams": Estimate.mean(*distinct_ngrams(texts, 4)),
        "diversity": Estimate.mean(*diversity(texts)),
        **{f"entropy_{size}gram_bits": ngram_entropy(texts, size) for size in ENTROPY_SIZES},
        "self_bleu": self_bleu(texts),
    }


def rewrites(rollouts: ReplayedRollouts) -> tuple[Bool, Int64]:
    """Backspaces that are followed at once by the token they took back.

    Returns:
        [A] whether each action is one; [L] longest run of them in each rollout, one every second action.
    """
    tokens, log = rollouts.logs.realised, rollouts.played.log
    rewritten = np.zeros(len(tokens), dtype=np.bool_)
    longest = np.zeros(rollouts.logs.num_logs, dtype=np.int64)
    candidates = np.flatnonzero(tokens[:-1] == rollouts.contract.backspace_id)
    candidates = candidates[log[candidates] == log[candidates + 1]]
    rewritten[candidates] = tokens[candidates + 1] == tokens[rollouts.played.state[candidates]]
    # In a run every second action is a rewrite, so the actions of even and odd index are looked at apart.
    for parity in (0, 1):
        hit, log_of_event = rewritten[parity::2], log[parity::2]
        position = np.arange(len(hit))
        begins = np.diff(log_of_event, prepend=-1) != 0
        breaks = np.where(hit, np.where(begins, position - 1, -1), position)
        np.maximum.at(longest, log_of_event, position - np.maximum.accumulate(breaks))
    return rewritten, longest


def _editing_metrics(rollouts: ReplayedRollouts) -> dict[str, Estimate]:
    every = np.arange(len(rollouts.logs.actions))
    is_backspace = rollouts.logs.actions == rollouts.contract.backspace_id
    rewritten, longest = rewrites(rollouts)
    lengths = rollouts.logs.lengths.astype(np.float64), rollouts.texts.lengths.astype(np.float64)
    return {
        "truncated_rate": Estimate.fraction(~rollouts.ended_by("eos")),
        "backspace_rate": rollouts.fraction_of(is_backspace, every),
        "actions_per_final_token": Estimate.ratio(*lengths),
        "rewritten_rate": rollouts.fraction_of(rewritten, is_backspace),
        "longest_rewrite_run": Estimate.mean(longest),
        "max_actions_rate": Estimate.fraction(rollouts.ended_by("max_actions")),
    }


def _correct(rollouts: ReplayedRollouts, examples: Dataset, task: Task) -> Bool:
    prompts = examples.select_columns(["prompt_ids"]).with_format("arrow")[:].column("prompt_ids")
    if prompts.to_pylist() != rollouts.batch.column("prompt_ids").to_pylist():
        counts = f"{rollouts.batch.num_rows} rollouts and {len(examples)} examples"
        raise ValueError(f"{counts} do not have the same prompts in the same order")
    if task.is_correct is None:
        raise ValueError(f"task {task.name} has no right answers")
    rows: list[Mapping[str, object]] = list(examples)
    right = [task.is_correct(text, row) for text, row in zip(rollouts.decoded(task), rows, strict=True)]
    return np.array(right, dtype=np.bool_) & rollouts.ended_by("eos")


def _judge_tokens(rollouts: ReplayedRollouts, references: Ragged) -> tuple[Bool, Bool]:
    """(judged [A], right [A]); `right` means something where judged.

    The number of mistakes in the text is a running sum over the rollout: an appended mistake adds one, taking one back
    subtracts it. A token is judged where that sum was zero before it.
    """
    tokens, played = rollouts.logs.realised, rollouts.played
    is_append = tokens != rollouts.contract.backspace_id
    index = played.depth - 1
    in_reference = is_append & (index < references.lengths[played.log])
    right = np.zeros(len(tokens), dtype=np.bool_)
    at = references.offsets[:-1][played.log[in_reference]] + index[in_reference]
    right[in_reference] = references.values[at] == tokens[in_reference]
    is_mistake = is_append & ~right
    # A backspace takes back the token that made its state.
    change = np.where(is_append, is_mistake.astype(np.int64), -is_mistake[played.state].astype(np.int64))
    before = np.concatenate([[0], np.cumsum(change)])
    mistakes = before[:-1] - before[rollouts.logs.offsets[:-1]][played.log]
    return in_reference & (mistakes == 0) & ~np.isin(tokens, rollouts.contract.eos_ids), right
