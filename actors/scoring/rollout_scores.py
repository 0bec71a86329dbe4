"""Reward and features of finished rollouts, written into their rows before they go to the buffer.

A row without a finite number is dropped, with the reason; the others of its batch are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actors.scoring.scorers import Answer, Scorer, make_scorer
from actors.scoring.settings import ScoringSettings, title_of
from buffer.experts.ragged import Ragged
from buffer.trajectory.replay import ActionLogs, final_token_ids, replay
from buffer.trajectory.schema import TokenContract

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ScoredRollouts:
    """rollouts: those that were scored, in their order. dropped: reasons, by the ids of the others."""

    rollouts: pa.RecordBatch
    dropped: dict[str, str]


class ScorerTimeoutError(TimeoutError):
    """A scorer did not return in time."""


class _NamedScorer:
    """A scorer, how messages call it, and the longest that one call may take."""

    def __init__(self, title: str, scorer: Scorer, timeout_s: float) -> None:
        self.title = title
        self._scorer = scorer
        self._timeout_s = timeout_s

    def attempt(self, answers: Sequence[Answer]) -> tuple[Float32, str | None]:
        """Scores and None, or no scores and why.

        Each call has a thread of its own: Python code cannot be interrupted, but it need not be waited for.
        """
        outcome: SimpleQueue[Float32 | Exception | SystemExit] = SimpleQueue()
        Thread(target=self._call, args=(answers, outcome), name=f"scorer {self.title}", daemon=True).start()
        try:
            found = outcome.get(timeout=self._timeout_s)
        except Empty:
            raise ScorerTimeoutError(
                f"{self.title} did not return within scoring.timeout_s={self._timeout_s:g} for {len(answers)} answers: "
                "raise the time-out, or mend the scorer"
            ) from None
        if isinstance(found, BaseException):
            return np.empty(0, dtype=np.float32), f"{self.title} raised {type(found).__name__}: {found}"
        return found, None

    def _call(self, answers: Sequence[Answer], outcome: SimpleQueue[Float32 | Exception | SystemExit]) -> None:
        try:
            with np.errstate(over="ignore"):  # beyond float32 is not finite, which the caller sees
                scores = np.asarray(self._scorer(answers), dtype=np.float32)
            if scores.shape != (len(answers),):
                raise ValueError(f"an array of shape {scores.shape} for {len(answers)} answers")
        except (Exception, SystemExit) as error:  # noqa: BLE001 (a user's function may raise anything; the run goes on)
            outcome.put(error)
        else:
            outcome.put(scores)


class RolloutScoring:
    """The reward and the features of one run.

    Args:
        settings: at least one scorer.
        tokenizer: of the task. examples: `prompt_ids` and `target_ids` of those that prompts come from.

    Raises:
        ValueError: a function cannot be imported, or a classifier not loaded.
    """

    def __init__(
        self,
        settings: ScoringSettings,
        tokenizer: PreTrainedTokenizerBase,
        contract: TokenContract,
        examples: pa.Table,
    ) -> None:
        assert settings.scorers
        self._settings = settings
        self._scorers = [
            _NamedScorer(title_of(name, each), make_scorer(each), settings.timeout_s)
            for name, each in settings.scorers.items()
        ]
        self._tokenizer = tokenizer
        self._contract = contract
        self._examples = examples

    def score(self, rollouts: pa.RecordBatch) -> ScoredRollouts:
        """Fill the columns `reward` and `features` of a batch of the trajectory schema.

        Raises:
            ScorerTimeoutError: a scorer did not return in time. Its thread goes on: the process is of no more use.
        """
        answers = self._answers(rollouts)
        reasons: dict[int, str] = {}
        numbers = [_scored(scorer, answers, reasons) for scorer in self._scorers]
        features = numbers[0 if self._settings.reward is None else 1 :]
        if self._settings.reward is not None:
            rollouts = _with_column(rollouts, "reward", pa.array(numbers[0]))
        if features:
            rollouts = _with_column(rollouts, "features", _list_column(features))
        if not reasons:
            return ScoredRollouts(rollouts, {})
        ids = rollouts.column("id")
        dropped = {ids[row].as_py(): reason for row, reason in sorted(reasons.items())}
        kept = [row for row in range(len(answers)) if row not in reasons]
        return ScoredRollouts(rollouts.take(pa.array(kept, pa.int64())), dropped)

    def _answers(self, rollouts: pa.RecordBatch) -> list[Answer]:
        logs = ActionLogs.from_batch(rollouts)
        offsets, ids = final_token_ids(logs, replay(logs, self._contract.backspace_id), self._contract.backspace_id)
        is_text = ~np.isin(ids, self._contract.eos_ids)
        kept_before = np.concatenate([[0], np.cumsum(is_text)])
        answers = Ragged(kept_before[offsets], ids[is_text])
        prompts = Ragged(logs.prompt_offsets, logs.prompt_ids)
        references = [self._targets[self._row_of_prompt[prompt.tobytes()]] for prompt in prompts.rows()]
        columns = zip(
            self._texts(prompts.rows()),
            self._texts(answers.rows()),
            answers.lengths.tolist(),
            self._texts([target[target != self._contract.eos_id] for target in references]),
            [reason == "eos" for reason in rollouts.column("finish_reason").to_pylist()],
            strict=True,
        )
        return [Answer(*values) for values in columns]

    def _texts(self, rows: Sequence[npt.NDArray[np.int32]]) -> list[str]:
        texts: list[str] = self._tokenizer.batch_decode([row.tolist() for row in rows])
        return texts

    @cached_property
    def _targets(self) -> list[npt.NDArray[np.int32]]:
        return Ragged.from_arrow(self._examples.column("target_ids")).rows()

    @cached_property
    def _row_of_prompt(self) -> dict[bytes, int]:
        """Of examples with the same prompt the first one counts."""
        found: dict[bytes, int] = {}
        for row, prompt in enumerate(Ragged.from_arrow(self._examples.column("prompt_ids")).rows()):
            found.setdefault(prompt.tobytes(), row)
        return found


def _scored(scorer: _NamedScorer, answers: Sequence[Answer], reasons: dict[int, str]) -> Float32:
    """[n] scores, nan where there is none; `reasons` gains why, by row.

    A scorer that fails on the batch is asked again row by row, to find those that it fails on.
    """
    scores, failure = scorer.attempt(answers)
    if failure is not None:
        scores = np.full(len(answers), np.nan, dtype=np.float32)
        for row, answer in enumerate(answers):
            alone, failure = scorer.attempt([answer])
            if failure is None:
                scores[row] = alone[0]
            else:
                reasons.setdefault(row, failure)
    for row in np.flatnonzero(~np.isfinite(scores)).tolist():
        reasons.setdefault(row, f"{scorer.title} is {scores[row]}")
    return scores


def _with_column(batch: pa.RecordBatch, name: str, column: pa.Array) -> pa.RecordBatch:
    index = batch.schema.get_field_index(name)
    return batch.set_column(index, batch.schema.field(index), column)


def _list_column(features: Sequence[Float32]) -> pa.ListArray:
    """[n] lists of one number of each of the [n] columns."""
    table = np.stack(features, axis=1)
    offsets = np.arange(len(table) + 1, dtype=np.int32) * len(features)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(table.ravel()))
