"""Columns of text for stored trajectories, decoded a batch at a time and only when somebody asks for them.

prompt_text    the prompt
final_text     what is left of the answer at the end of the log
marked_text    the answer with what was taken back and what was noise, marked as in `launch.rollout_view`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from buffer.experts.ragged import Ragged
from buffer.trajectory.replay import ActionLogs, final_token_ids, replay
from buffer.trajectory.schema import TokenContract
from launch.rollout_view import as_shown, view_rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_INPUTS = {
    "prompt_text": ("prompt_ids",),
    "final_text": ("prompt_ids", "actions", "realised"),
    "marked_text": ("prompt_ids", "actions", "realised", "finish_reason"),
}
"""Per column of text, the columns of a trajectory that it is made of, in the order of the method's parameters."""


class TextColumns:
    """Text of trajectories of one token contract. The tokenizer is loaded at the first use of any column."""

    def __init__(self, contract: TokenContract, load_tokenizer: Callable[[], PreTrainedTokenizerBase]) -> None:
        self._contract = contract
        self._load_tokenizer = load_tokenizer
        self._loaded: PreTrainedTokenizerBase | None = None
        self._load_error: ValueError | OSError | None = None

    @property
    def load_error(self) -> ValueError | OSError | None:
        """Why there is no tokenizer; None as long as nobody needed one in vain."""
        return self._load_error

    def prompt_text(self, prompt_ids: pa.ChunkedArray) -> pa.StringArray:
        """[n] prompts.

        Raises:
            ValueError, OSError: there is no tokenizer (see `launch.run_folder.task`); this holds for every column.
        """
        return pa.array(self._decode_all(prompt_ids.to_pylist()), pa.string())

    def final_text(
        self, prompt_ids: pa.ChunkedArray, actions: pa.ChunkedArray, realised: pa.ChunkedArray
    ) -> pa.StringArray:
        """[n] answers as they stand at the end, without `<eos>`; decoded in their place behind the prompt, because
        many tokenizers drop the space of a first token.
        """
        logs = ActionLogs.from_batch(_batch(prompt_ids=prompt_ids, actions=actions, realised=realised))
        offsets, ids = final_token_ids(logs, replay(logs, self._contract.backspace_id), self._contract.backspace_id)
        answers = [part[~np.isin(part, self._contract.eos_ids)].tolist() for part in Ragged(offsets, ids).rows()]
        prompts: list[list[int]] = prompt_ids.to_pylist()
        starts = self._decode_all(prompts)
        wholes = self._decode_all([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
        return pa.array(
            [
                whole[len(start) :] if whole.startswith(start) else self._decode_all([answer])[0]
                for start, whole, answer in zip(starts, wholes, answers, strict=True)
            ],
            pa.string(),
        )

    def marked_text(
        self,
        prompt_ids: pa.ChunkedArray,
        actions: pa.ChunkedArray,
        realised: pa.ChunkedArray,
        finish_reason: pa.ChunkedArray,
    ) -> pa.StringArray:
        """[n] answers with their deletions, as `RolloutView.plain` writes them."""
        batch = _batch(prompt_ids=prompt_ids, actions=actions, realised=realised, finish_reason=finish_reason)
        tokenizer = self._tokenizer()
        views = (view_rollout(batch, index, tokenizer, self._contract) for index in range(batch.num_rows))
        return pa.array([view.plain() for view in views], pa.string())

    def _decode_all(self, ids: list[list[int]]) -> list[str]:
        texts: list[str] = self._tokenizer().batch_decode(ids, clean_up_tokenization_spaces=False)
        return [as_shown(text) for text in texts]

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self._loaded is None:
            try:
                self._loaded = self._load_tokenizer()
            except (ValueError, OSError) as error:
                self._load_error = error
                raise
        return self._loaded


def _batch(**columns: pa.ChunkedArray) -> pa.RecordBatch:
    arrays = [column.combine_chunks() for column in columns.values()]
    return pa.RecordBatch.from_arrays(arrays, names=list(columns))
