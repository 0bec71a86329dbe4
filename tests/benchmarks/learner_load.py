"""What the learner's benchmarks train on: random logs without backspace, so that every trainer has the same tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from buffer.trajectory.schema import TokenContract
from launch.errors import UserError
from tests.benchmarks.tiny_llama import BACKSPACE_ID, EOS_ID, FIRST_TEXT_ID
from tests.trajectories import batch_of, expert_row

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TrainingLoad:
    """Texts of equal length, so that no trainer pads: the hardest case to beat.

    ids: [logs, length] prompt and answer; the answer ends with `<eos>`. Steps take `batch` rows each, in order.
    """

    ids: Int32
    prompt_length: int
    batch: int

    @property
    def length(self) -> int:
        """Tokens of each text."""
        return int(self.ids.shape[1])

    @property
    def actions_per_step(self) -> int:
        """Tokens that are trained; the prompt's are not."""
        return self.batch * (self.length - self.prompt_length)

    @property
    def labels(self) -> Int32:
        """[logs, length] of the libraries that we compare with: -100 is not trained."""
        labels = self.ids.copy()
        labels[:, : self.prompt_length] = -100
        return labels

    def trajectories(self, vocab_size: int) -> pa.RecordBatch:
        """The same as expert trajectories."""
        contract = TokenContract(vocab_size, BACKSPACE_ID, EOS_ID, tokenizer_hash="random")
        split = self.prompt_length
        rows = [
            expert_row(f"bench/{number}", text[split:], prompt_ids=text[:split], finish_reason="eos")
            for number, text in enumerate(self.ids.tolist())
        ]
        return batch_of(rows, contract)


def make_load(
    *, batch: int, length: int, prompt_length: int, logs_per_prompt: int, vocab_size: int, steps: int, seed: int
) -> TrainingLoad:
    """Random texts for `steps` steps; `logs_per_prompt` in a row share their prompt.

    Raises:
        UserError: a batch does not hold whole groups, or a text holds no prompt and answer.
    """
    if batch % logs_per_prompt or not 0 < prompt_length < length:
        raise UserError(
            f"batch={batch} must be a multiple of {logs_per_prompt} and the text longer than its prompt "
            f"({length}, {prompt_length}); choose other sizes"
        )
    generator = np.random.default_rng(seed)
    ids = generator.integers(FIRST_TEXT_ID, vocab_size, (batch * steps, length), dtype=np.int32)
    ids[:, :prompt_length] = np.repeat(ids[::logs_per_prompt, :prompt_length], logs_per_prompt, axis=0)
    ids[:, -1] = EOS_ID
    return TrainingLoad(ids, prompt_length, batch)


class LoadSource:
    """A `learner.batches.source.BatchSource` that gives the trajectories of a load in order, again and again."""

    def __init__(self, trajectories: pa.RecordBatch) -> None:
        self._trajectories = trajectories
        self._next = 0

    def rewind(self) -> None:
        """Start again at the first one."""
        self._next = 0

    def draw(self, count: int) -> pa.RecordBatch:
        """The next `count` trajectories."""
        if self._next + count > len(self._trajectories):
            self._next = 0
        drawn = self._trajectories.slice(self._next, count)
        self._next += count
        return drawn
