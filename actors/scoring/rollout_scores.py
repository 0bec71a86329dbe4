"""Reward and features of finished rollouts, written into their rows before they go to the buffer.

A row without a finite number is dropped, with the reason; the others of its batch are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actors.scoring.scorers import Answer, Scorer, make_scorer
from actors.scoring.settings import ScoringSettings
from buffer.experts.ragged import Ragged
from buffer.replay import ActionLogs, final_token_ids, replay
from buffer.schema import TokenContract

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ScoredRollouts:
    """rollouts: those that were scored, in their order. dropped: reasons, by the ids of the others."""

    rollouts: pa.RecordBatch
    dropped: dict[str, str]


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
        self._scorers = {name: make_scorer(each) for name, each in settings.scorers.items()}
        self._tokenizer = tokenizer
        self._contract = contract
        self._examples = examples

    def score(self, rollouts: pa.RecordBatch) -> ScoredRollouts:
        """Fill the columns `reward` and `features` of a batch of the trajectory schema."""
        answers = self._answers(rollouts)
        reasons: dict[int, str] = {}
        numbers = [_scored(scorer, name, answers, reasons) for name, scorer in self._scorers.items()]
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
        kept_before = np.concatenate([[0], np.cumsum(ids != self._contract.eos_id)])
        answers = Ragged(kept_before[offsets], ids[ids != self._contract.eos_id])
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


def _scored(scorer: Scorer, name: str, answers: Sequence[Answer], reasons: dict[int, str]) -> Float32:
    """[n] scores, nan where there is none; `reasons` gains why, by row.

    A scorer that fails on the batch is asked again row by row, to find those that it fails on.
    """
    scores, failure = _attempt(scorer, name, answers)
    if failure is not None:
        scores = np.full(len(answers), np.nan, dtype=np.float32)
        for row, answer in enumerate(answers):
            alone, failure = _attempt(scorer, name, [answer])
            if failure is None:
                scores[row] = alone[0]
            else:
                reasons.setdefault(row, failure)
    for row in np.flatnonzero(~np.isfinite(scores)).tolist():
        reasons.setdefault(row, f"{name} is {scores[row]}")
    return scores


def _attempt(scorer: Scorer, name: str, answers: Sequence[Answer]) -> tuple[Float32, str | None]:
    """Scores and None, or no scores and why."""
    try:
        with np.errstate(over="ignore"):  # beyond float32 is not finite, which the caller sees
            scores = np.asarray(scorer(answers), dtype=np.float32)
        if scores.shape != (len(answers),):
            raise ValueError(f"an array of shape {scores.shape} for {len(answers)} answers")
    except Exception as error:  # noqa: BLE001 (a user's function may raise anything, and the run goes on)
        return np.empty(0, dtype=np.float32), f"{name} raised {type(error).__name__}: {error}"
    return scores, None


def _with_column(batch: pa.RecordBatch, name: str, column: pa.Array) -> pa.RecordBatch:
    index = batch.schema.get_field_index(name)
    return batch.set_column(index, batch.schema.field(index), column)


def _list_column(features: Sequence[Float32]) -> pa.ListArray:
    """[n] lists of one number of each of the [n] columns."""
    table = np.stack(features, axis=1)
    offsets = np.arange(len(table) + 1, dtype=np.int32) * len(features)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(table.ravel()))
