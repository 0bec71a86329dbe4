"""Numbers of rollouts, each with its standard error; docs/evaluation.md lists them.

A batch holds one rollout per example, in their order.

A token is judged if the text before it, at the moment it is appended, is a prefix of the reference answer. It is right
if it is the reference's next token there, else wrong. What follows a mistake is neither; nor is `<eos>`, which nothing
can take back. A token counts as taken back if it is gone at the end, whichever backspace removed it.

Repetition within texts and between them is counted over token ids, so that no other tokenization enters. rep-n and
diversity follow Su et al., A Contrastive Framework for Neural Text Generation (arXiv 2202.06417): rep-n is the fraction
of a text's n-grams that repeat an earlier one, diversity the product of 1 - rep-n over n = 2, 3, 4.

Self-BLEU (Zhu et al., Texygen, arXiv 1802.01886) says how much each text resembles the others: BLEU-4 against the
others of its block. The more references, the higher BLEU: blocks of one size keep numbers of different numbers of texts
comparable. An n-gram size without a match counts as 0.1 matches (Chen & Cherry, 2014, smoothing 1).
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
from buffer.trajectory.replay import Replay, TrajectoryArrays, replay, surviving_events
from buffer.trajectory.schema import TokenContract
from launch.evaluation.rollouts import first_targets, references
from launch.statistics import Bool, Estimate, Float64, Int64

if TYPE_CHECKING:
    from datasets import Dataset

ENTROPY_SIZES = (1, 2, 4)
DIVERSITY_SIZES = (2, 3, 4)
BLOCK_TEXTS = 100
MAX_SIZE = 4
SMOOTHED_MATCHES = 0.1


@dataclass(frozen=True)
class ReplayedRollouts:
    """L rollouts with A actions, and what their replay says."""

    batch: pa.RecordBatch
    contract: TokenContract
    trajectories: TrajectoryArrays
    played: Replay

    @classmethod
    def of(cls, batch: pa.RecordBatch, contract: TokenContract) -> ReplayedRollouts:
        """The rollouts of a batch of trajectories."""
        trajectories = TrajectoryArrays.from_batch(batch)
        return cls(batch, contract, trajectories, replay(trajectories, contract.backspace_id))

    @cached_property
    def survives(self) -> Bool:
        """[A] whether the token that an action appended is there at the end."""
        return surviving_events(self.trajectories, self.played, self.contract.backspace_id)

    @cached_property
    def texts(self) -> Ragged:
        """What remains of each rollout, without `<eos>`."""
        kept = self.survives & ~np.isin(self.trajectories.executed, self.contract.eos_ids)
        lengths = np.bincount(self.played.trajectory[kept], minlength=self.trajectories.num_trajectories)
        return Ragged.from_lengths(lengths, self.trajectories.executed[kept])

    def ended_by(self, reason: str) -> Bool:
        """[L] whether a rollout has this finish reason."""
        ended: Bool = np.array(self.batch.column("finish_reason").to_pylist()) == reason
        return ended

    def fraction_of(self, cases: Bool, actions: Bool | Int64) -> Estimate:
        """How often `cases` [A] are true of these actions."""
        return Estimate.fraction(cases[actions], self.played.trajectory[actions], self.trajectories.num_trajectories)

    def forced_tokens_deleted(self, num_forced: int) -> tuple[Bool, Estimate]:
        """[L] whether all forced tokens are gone at the end; how many are. ValueError: a rollout is shorter."""
        if (self.trajectories.lengths < num_forced).any():
            raise ValueError(f"a rollout is shorter than the {num_forced} tokens that were forced in it")
        forced = self.trajectories.offsets[:-1, None] + np.arange(num_forced)
        return np.logical_and.reduce(~self.survives[forced], axis=1), self.fraction_of(~self.survives, forced.ravel())

    def decoded(self, task: Task) -> list[str]:
        """The final text of each rollout."""
        texts: list[str] = task.tokenizer.batch_decode([ids.tolist() for ids in self.texts.rows()])
        return texts


def answer_metrics(
    rollouts: ReplayedRollouts, examples: Dataset, task: Task, num_forced: int = 0
) -> dict[str, Estimate]:
    """All numbers of answers, `num_forced` tokens forced, the first wrong; ValueError if they are of other examples."""
    correct = Estimate.fraction(correct_answers(rollouts, examples, task))
    if num_forced:
        _, taken_back = rollouts.forced_tokens_deleted(num_forced)
        if (rollouts.trajectories.executed[rollouts.trajectories.offsets[:-1]] == first_targets(examples)).any():
            raise ValueError("a rollout begins with the right token: recovery is measured from a wrong one")
        return {"recovery": correct, "forced_tokens_deleted": taken_back}
    judged, right = _judge_tokens(rollouts, references(examples))
    return {
        "accuracy": correct,
        "empty_rate": Estimate.fraction(rollouts.texts.lengths == 0),
        "actions_per_answer": Estimate.mean(rollouts.trajectories.lengths),
        **_editing_metrics(rollouts),
        "wrong_tokens_deleted": rollouts.fraction_of(~rollouts.survives, judged & ~right),
        "correct_tokens_deleted": rollouts.fraction_of(~rollouts.survives, judged & right),
    }


def text_metrics(rollouts: ReplayedRollouts, num_forced: int = 0) -> dict[str, Estimate]:
    """All numbers of generated texts, the first `num_forced` tokens of each forced; ValueError if one is shorter."""
    texts = rollouts.texts
    recovered = {}
    if num_forced:
        all_gone, taken_back = rollouts.forced_tokens_deleted(num_forced)
        recovered = {"recovery": Estimate.fraction(all_gone), "forced_tokens_deleted": taken_back}
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
    """[A] whether each action is a backspace that is followed at once by the token it took back; [L] longest run of
    these in each rollout, one every second action.
    """
    tokens, trajectory = rollouts.trajectories.executed, rollouts.played.trajectory
    rewritten = np.zeros(len(tokens), dtype=np.bool_)
    longest = np.zeros(rollouts.trajectories.num_trajectories, dtype=np.int64)
    candidates = np.flatnonzero(tokens[:-1] == rollouts.contract.backspace_id)
    candidates = candidates[trajectory[candidates] == trajectory[candidates + 1]]
    rewritten[candidates] = tokens[candidates + 1] == tokens[rollouts.played.state[candidates]]
    # In a run every second action is a rewrite, so the actions of even and odd index are looked at apart.
    for parity in (0, 1):
        hit, trajectory_of_event = rewritten[parity::2], trajectory[parity::2]
        position = np.arange(len(hit))
        begins = np.diff(trajectory_of_event, prepend=-1) != 0
        breaks = np.where(hit, np.where(begins, position - 1, -1), position)
        np.maximum.at(longest, trajectory_of_event, position - np.maximum.accumulate(breaks))
    return rewritten, longest


def _editing_metrics(rollouts: ReplayedRollouts) -> dict[str, Estimate]:
    every = np.arange(len(rollouts.trajectories.actions))
    is_backspace = rollouts.trajectories.actions == rollouts.contract.backspace_id
    rewritten, longest = rewrites(rollouts)
    lengths = rollouts.trajectories.lengths.astype(np.float64), rollouts.texts.lengths.astype(np.float64)
    return {
        "truncated_rate": Estimate.fraction(~rollouts.ended_by("eos")),
        "backspace_rate": rollouts.fraction_of(is_backspace, every),
        "actions_per_final_token": Estimate.ratio(*lengths),
        "rewritten_rate": rollouts.fraction_of(rewritten, is_backspace),
        "longest_rewrite_run": Estimate.mean(longest),
        "max_actions_rate": Estimate.fraction(rollouts.ended_by("max_actions")),
    }


def correct_answers(rollouts: ReplayedRollouts, examples: Dataset, task: Task) -> Bool:
    """[L] whether each answer is right and ended by `<eos>`; ValueError if they are of other examples."""
    prompts = examples.select_columns(["prompt_ids"]).with_format("arrow")[:].column("prompt_ids")
    if prompts.to_pylist() != rollouts.batch.column("prompt_ids").to_pylist():
        counts = f"{rollouts.batch.num_rows} rollouts and {len(examples)} examples"
        raise ValueError(f"{counts} do not have the same prompts in the same order")
    assert task.is_correct is not None
    rows: list[Mapping[str, object]] = list(examples)
    right = [task.is_correct(text, row) for text, row in zip(rollouts.decoded(task), rows, strict=True)]
    return np.array(right, dtype=np.bool_) & rollouts.ended_by("eos")


def _judge_tokens(rollouts: ReplayedRollouts, references: Ragged) -> tuple[Bool, Bool]:
    """(judged [A], right [A]); `right` means something where judged.

    The number of mistakes in the text is a running sum over the rollout: an appended mistake adds one, taking one back
    subtracts it. A token is judged where that sum was zero before it.
    """
    tokens, played = rollouts.trajectories.executed, rollouts.played
    is_append = tokens != rollouts.contract.backspace_id
    index = played.depth - 1
    in_reference = is_append & (index < references.lengths[played.trajectory])
    right = np.zeros(len(tokens), dtype=np.bool_)
    at = references.offsets[:-1][played.trajectory[in_reference]] + index[in_reference]
    right[in_reference] = references.values[at] == tokens[in_reference]
    is_mistake = is_append & ~right
    # A backspace takes back the token that made its state.
    change = np.where(is_append, is_mistake.astype(np.int64), -is_mistake[played.state].astype(np.int64))
    before = np.concatenate([[0], np.cumsum(change)])
    mistakes = before[:-1] - before[rollouts.trajectories.offsets[:-1]][played.trajectory]
    return in_reference & (mistakes == 0) & ~np.isin(tokens, rollouts.contract.eos_ids), right


@dataclass(frozen=True)
class Ngrams:
    """The n-grams of R texts, G in all.

    text: [G] text of each, ascending. gram: [G] number of the distinct n-gram that it is, from 0.
    """

    text: Int64
    gram: Int64
    num_texts: int

    @classmethod
    def of(cls, texts: Ragged, size: int) -> Ngrams:
        """Those of `size` ids of each text; shorter texts have none."""
        lengths = texts.lengths
        row = np.repeat(np.arange(len(lengths)), lengths)
        starts = np.flatnonzero(np.arange(len(row)) - texts.offsets[:-1][row] + size <= lengths[row])
        # Numbered by doubling the key one id at a time: two numbers below 2^31 make one of 64 bits, and no row is
        # sorted.
        gram = np.zeros(len(starts), dtype=np.int64)
        for shift in range(size):
            _, gram = np.unique((gram << 32) | texts.values[starts + shift], return_inverse=True)
        return cls(row[starts], gram, len(lengths))

    @property
    def per_text(self) -> Int64:
        """[R] n-grams of each text."""
        counts: Int64 = np.bincount(self.text, minlength=self.num_texts)
        return counts


def distinct_ngrams(texts: Ragged, size: int) -> tuple[Float64, Bool]:
    """[R] distinct n-grams per n-gram of each text (1 - rep-n), and [R] whether it has any (else 0)."""
    found = Ngrams.of(texts, size)
    total = found.per_text
    seen = np.unique((found.text << 32) | found.gram) >> 32
    distinct = np.bincount(seen, minlength=found.num_texts)
    return distinct / np.maximum(total, 1), total > 0


def diversity(texts: Ragged) -> tuple[Float64, Bool]:
    """[R] product of 1 - rep-n over n = 2, 3, 4 of each text, and [R] whether it is long enough to have one."""
    found = [distinct_ngrams(texts, size) for size in DIVERSITY_SIZES]
    return np.prod([fraction for fraction, _ in found], axis=0), found[-1][1]


def ngram_entropy(texts: Ragged, size: int) -> Estimate:
    """Shannon entropy in bits of the n-grams of all texts together, with the linearized error for texts as a whole.

    It is biased downwards, the more so the fewer n-grams there are: compare it at the same number of tokens only.
    """
    found = Ngrams.of(texts, size)
    count = int(np.count_nonzero(found.per_text))
    if len(found.gram) == 0:
        return Estimate(None, None, count)
    surprise = -np.log2(np.bincount(found.gram) / len(found.gram))[found.gram]
    entropy = float(surprise.mean())
    influence = np.bincount(found.text, surprise - entropy, minlength=found.num_texts) / len(found.gram)
    return Estimate.linear(entropy, influence, count)


def self_bleu(texts: Ragged) -> Estimate:
    """Mean self-BLEU, between 0 and 1, of the texts with at least four tokens, in blocks of `BLOCK_TEXTS` as they come.

    Texts that do not fill the last block are left out, unless it is the only one.
    """
    num_texts = texts.num_rows
    block = min(num_texts, BLOCK_TEXTS)
    used = num_texts - num_texts % block if block > 1 else 0
    scores = np.zeros(num_texts)
    for begin in range(0, used, max(block, 1)):
        ids = texts.values[texts.offsets[begin] : texts.offsets[begin + block]]
        rows = slice(begin, begin + block)
        scores[rows] = _block_bleu(Ragged.from_lengths(texts.lengths[rows], ids))
    return Estimate.mean(scores, (texts.lengths >= MAX_SIZE) & (np.arange(num_texts) < used))


def _block_bleu(texts: Ragged) -> Float64:
    """[R] BLEU of each of R > 1 texts against all others."""
    lengths = texts.lengths
    log_precision = np.zeros(texts.num_rows)
    for size in range(1, MAX_SIZE + 1):
        found = Ngrams.of(texts, size)
        num_grams = int(found.gram.max(initial=-1)) + 1
        cells = np.bincount(found.text * num_grams + found.gram, minlength=found.num_texts * num_grams)
        counts = cells.reshape(found.num_texts, num_grams).astype(np.int32)
        second, largest = np.partition(counts, -2, axis=0)[-2:]
        # Each n-gram counts as often as another text has it at most: the largest count among the others is the second
        # largest for the text that has the largest.
        matches = np.minimum(counts, np.where(counts == largest, second, largest)).sum(axis=1).astype(np.float64)
        matches[matches == 0] = SMOOTHED_MATCHES
        log_precision += np.log(matches / np.maximum(found.per_text, 1)) / MAX_SIZE
    # The reference nearest in length, the shorter of two (Papineni et al., 2002).
    others = np.abs(lengths[:, None] - lengths[None, :]) * 2.0 + (lengths[None, :] > lengths[:, None])
    np.fill_diagonal(others, np.inf)
    nearest = lengths[np.argmin(others, axis=1)]
    bleu: Float64 = np.exp(log_precision + np.minimum(0.0, 1.0 - nearest / np.maximum(lengths, 1)))
    return bleu
