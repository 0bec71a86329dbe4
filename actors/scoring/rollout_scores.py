"""Reward and features of finished rollouts, written into their rows before they go to the buffer.

A row without a finite number is dropped, with the reason; the others of its batch are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actors.scoring.scorers import Answer, make_scorer
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


class RolloutScoring:
    """The reward and the features of one run.

    Raises (on creation):
        ValueError: a function cannot be imported, or a classifier not loaded.
    """

    def __init__(
        self,
        settings: ScoringSettings,
        tokenizer: PreTrainedTokenizerBase,
        contract: TokenContract,
        examples: pa.Table,
    ) -> None:
        """settings: at least one scorer. tokenizer: of the task. examples: `prompt_ids` and `target_ids` of those that
        prompts come from.
        """
        assert settings.scorers
        self._settings = settings
        self._scorers = {title_of(name, each): make_scorer(each) for name, each in settings.scorers.items()}
        self._tokenizer = tokenizer
        self._contract = contract
        prompts, targets = (Ragged.from_arrow(examples.column(name)).rows() for name in ("prompt_ids", "target_ids"))
        pairs = reversed(list(zip(prompts, targets, strict=True)))  # of examples with the same prompt the first counts
        self._target_of_prompt = {prompt.tobytes(): target[target != contract.eos_id] for prompt, target in pairs}

    def score(self, rollouts: pa.RecordBatch) -> ScoredRollouts:
        """Fill the columns `reward` and `features` of a batch of the trajectory schema.

        Raises:
            ScorerTimeoutError: a scorer did not return in time. Its thread goes on: the process is of no more use.
        """
        answers = self._answers(rollouts)
        reasons: dict[int, str] = {}
        numbers = [self._scored(title, answers, reasons) for title in self._scorers]
        features = numbers[0 if self._settings.reward is None else 1 :]
        if self._settings.reward is not None:
            rollouts = _with_column(rollouts, "reward", pa.array(numbers[0]))
        if features:
            lists = pa.FixedSizeListArray.from_arrays(pa.array(np.stack(features, axis=1).ravel()), len(features))
            rollouts = _with_column(rollouts, "features", lists)
        ids = rollouts.column("id")
        dropped = {ids[row].as_py(): reason for row, reason in sorted(reasons.items())}
        kept = [row for row in range(len(answers)) if row not in reasons]
        return ScoredRollouts(rollouts.take(pa.array(kept, pa.int64())) if dropped else rollouts, dropped)

    def _answers(self, rollouts: pa.RecordBatch) -> list[Answer]:
        logs = ActionLogs.from_batch(rollouts)
        offsets, ids = final_token_ids(logs, replay(logs, self._contract.backspace_id), self._contract.backspace_id)
        is_text = ~np.isin(ids, self._contract.eos_ids)
        kept_before = np.concatenate([[0], np.cumsum(is_text)])
        answers = Ragged(kept_before[offsets], ids[is_text])
        prompts = Ragged(logs.prompt_offsets, logs.prompt_ids).rows()
        columns = zip(
            self._texts(prompts),
            self._texts(answers.rows()),
            answers.lengths.tolist(),
            self._texts([self._target_of_prompt[prompt.tobytes()] for prompt in prompts]),
            [reason == "eos" for reason in rollouts.column("finish_reason").to_pylist()],
            strict=True,
        )
        return [Answer(*values) for values in columns]

    def _texts(self, rows: Sequence[npt.NDArray[np.int32]]) -> list[str]:
        texts: list[str] = self._tokenizer.batch_decode([row.tolist() for row in rows])
        return texts

    def _scored(self, title: str, answers: Sequence[Answer], reasons: dict[int, str]) -> Float32:
        """[n] scores, nan where there is none; `reasons` gains why, by row.

        A scorer that fails on the batch is asked again row by row, to find those that it fails on.
        """
        scores = self._attempt(title, answers)
        if isinstance(scores, str):
            alone = [self._attempt(title, [answer]) for answer in answers]
            for row, found in enumerate(alone):
                if isinstance(found, str):
                    reasons.setdefault(row, found)
            scores = np.array([np.nan if isinstance(found, str) else found[0] for found in alone], dtype=np.float32)
        for row in np.flatnonzero(~np.isfinite(scores)).tolist():
            reasons.setdefault(row, f"{title} is {scores[row]}")
        return scores

    def _attempt(self, title: str, answers: Sequence[Answer]) -> Float32 | str:
        """[n] scores, or why there are none.

        Each call has a thread of its own: Python code cannot be interrupted, but it need not be waited for.
        """
        outcome: SimpleQueue[Float32 | str] = SimpleQueue()

        def call() -> None:
            try:
                with np.errstate(over="ignore"):  # beyond float32 is not finite, which the caller sees
                    scores = np.asarray(self._scorers[title](answers), dtype=np.float32)
                if scores.shape != (len(answers),):
                    raise ValueError(f"an array of shape {scores.shape} for {len(answers)} answers")
            except (Exception, SystemExit) as error:  # noqa: BLE001 (a user's function may raise anything)
                outcome.put(f"{title} raised {type(error).__name__}: {error}")
            else:
                outcome.put(scores)

        Thread(target=call, name=f"scorer {title}", daemon=True).start()
        try:
            return outcome.get(timeout=self._settings.timeout_s)
        except Empty:
            raise ScorerTimeoutError(
                f"{title} did not return within scoring.timeout_s={self._settings.timeout_s:g} for {len(answers)} "
                "answers: raise the time-out, or mend the scorer"
            ) from None


def _with_column(batch: pa.RecordBatch, name: str, column: pa.Array) -> pa.RecordBatch:
    index = batch.schema.get_field_index(name)
    field = batch.schema.field(index)
    return batch.set_column(index, field, column.cast(field.type))
