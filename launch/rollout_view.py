"""One rollout made visible: what was written, what was taken back, and what was not the policy's own.

On a terminal, deleted tokens are struck through in red, kept ones green, forced and noise tokens yellow, and the
prompt is dim and ends with a bar. As plain text, `1[-7-]6` is a 7 that was taken back, and `{7}` a token that was
forced or drawn as noise, so that `[-{7}-]6` is an injected error that was corrected. `…` ends a rollout that was cut
off.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import pyarrow as pa

from buffer.trajectory.replay import TrajectoryArrays, replay, surviving_events
from buffer.trajectory.schema import TokenContract

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

_CUT_OFF = "…"
FLOOR_MARK = "│"  # prompt and answer may run together otherwise: `77?` and `6128`
# A generated control character must not reach the terminal: it could move the cursor or set colors.
_VISIBLE = {
    code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), 127, *range(0x80, 0xA0)) if chr(code) not in "\n\t"
}


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one kind. `foreign`: forced, or noise."""

    text: str
    deleted: bool
    foreign: bool


@dataclass(frozen=True)
class RolloutView:
    """A rollout as text; see the module's description for the marks."""

    prompt: str
    segments: tuple[Segment, ...]
    finish_reason: str

    @property
    def text(self) -> str:
        """The answer: what remains of it at the end."""
        return "".join(segment.text for segment in self.segments if not segment.deleted)

    def rich(self) -> Text:
        """For a terminal."""
        from rich.text import Text

        text = Text(self.prompt + FLOOR_MARK, style="dim")
        for segment in self.segments:
            style = "yellow" if segment.foreign else "red" if segment.deleted else "green"
            text.append(segment.text, style=f"dim strike {style}" if segment.deleted else f"not dim {style}")
        if self.finish_reason != "eos":
            text.append(_CUT_OFF)
        return text

    def plain(self) -> str:
        """For a file or a trajectory; the answer only, without the prompt."""
        parts = []
        for segment in self.segments:
            text = f"{{{segment.text}}}" if segment.foreign else segment.text
            parts.append(f"[-{text}-]" if segment.deleted else text)
        return "".join(parts) + ("" if self.finish_reason == "eos" else _CUT_OFF)


def view_rollout(
    batch: pa.RecordBatch,
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    contract: TokenContract,
    num_forced: int = 0,
) -> RolloutView:
    """The trajectory at `index`, `num_forced` actions of it forced; ValueError where it takes back at the floor."""
    row = batch.slice(index, 1)
    trajectory = TrajectoryArrays.from_batch(row)
    played = replay(trajectory, contract.backspace_id)
    survives = surviving_events(trajectory, played, contract.backspace_id)
    foreign = (trajectory.executed != trajectory.actions) | (played.time < num_forced)
    prompt_ids = trajectory.prompt_ids.tolist()
    text, segments = list(prompt_ids), []
    hidden = {contract.backspace_id, *contract.eos_ids}
    written = zip(trajectory.executed.tolist(), survives.tolist(), foreign.tolist(), strict=True)
    # A segment ends where something is not shown, and where the kind changes.
    for kind, run in groupby(written, lambda each: None if each[0] in hidden else each[1:]):
        ids = [token for token, _, _ in run]
        if kind is not None:
            segments.append(Segment(continuation(tokenizer, text, ids), deleted=not kind[0], foreign=kind[1]))
        for token in ids:
            if token == contract.backspace_id:
                text.pop()
            elif kind is not None:
                text.append(token)
    return RolloutView(decode(tokenizer, prompt_ids), tuple(segments), row.column("finish_reason")[0].as_py())


def continuation(tokenizer: PreTrainedTokenizerBase, before: list[int], ids: list[int]) -> str:
    """Text that `ids` add: many tokenizers drop the space of a first token, so they are decoded behind `before`."""
    start, whole = decode(tokenizer, before), decode(tokenizer, before + ids)
    return whole[len(start) :] if whole.startswith(start) else decode(tokenizer, ids)


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Text of `ids`, as it may be shown."""
    return as_shown(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def as_shown(text: str) -> str:
    """Decoded text as it may be written to a terminal: control characters but for line breaks and tabs replaced."""
    return text.translate(_VISIBLE)
