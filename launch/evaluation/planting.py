"""Wrong tokens that an answer, or a text, is made to begin with, to see whether the policy takes them back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from buffer.experts.noise import NoiseCandidates
from buffer.experts.ragged import Int32, Ragged
from buffer.trajectory.schema import TokenContract

if TYPE_CHECKING:
    from datasets import Dataset

_ROUNDS = 100
"""Of drawing again, for all examples at once; after that, the few that are left draw among what is allowed."""


def lacks_wrong_tokens(examples: Dataset, candidates: NoiseCandidates, contract: TokenContract) -> str | None:
    """Why some of the examples cannot be made to begin with a wrong token; None where each can."""
    pairs, counts = np.unique(
        np.stack([np.asarray(examples["noise_group"], dtype=np.int64), first_targets(examples)]),
        axis=1,
        return_counts=True,
    )
    special = [*contract.eos_ids, contract.backspace_id]
    lacking = [
        count
        for group, first, count in zip(*pairs.tolist(), counts.tolist(), strict=True)
        if len(candidates.others(group, [*special, first])[0]) == 0
    ]
    if not lacking:
        return None
    return f"{sum(lacking)} of {len(examples)} examples have no plausible wrong token to begin with"


def plant_wrong_tokens(
    examples: Dataset, candidates: NoiseCandidates, contract: TokenContract, count: int, rng: np.random.Generator
) -> npt.NDArray[np.int32]:
    """[R, count] plausible tokens for each example; the first differs from the reference's, so that all are mistakes.

    Raises:
        ValueError: an example has no candidate (see `lacks_wrong_tokens`).
    """
    first = first_targets(examples)
    special = [np.full(len(examples), token, dtype=np.int32) for token in (*contract.eos_ids, contract.backspace_id)]
    groups = np.asarray(examples["noise_group"], dtype=np.int64)
    columns = [
        _draw(groups, candidates, np.stack([*special, *([first] if at == 0 else [])]), rng) for at in range(count)
    ]
    return np.stack(columns, axis=1)


def references(examples: Dataset) -> Ragged:
    """The tokens of the right answers."""
    return Ragged.from_arrow(examples.select_columns(["target_ids"]).with_format("arrow")[:].column("target_ids"))


def first_targets(examples: Dataset) -> Int32:
    """[R] the first token of each right answer."""
    right = references(examples)
    return right.values[right.offsets[:-1]]


def _draw(
    groups: npt.NDArray[np.int64], candidates: NoiseCandidates, refused: Int32, rng: np.random.Generator
) -> Int32:
    """[R] a candidate for each, none of the `refused` [n, R]."""
    tokens = candidates.draw(groups, rng)
    for _ in range(_ROUNDS):
        redraw = (tokens == refused).any(axis=0)
        if not redraw.any():
            return tokens
        tokens[redraw] = candidates.draw(groups[redraw], rng)
    for row in np.flatnonzero((tokens == refused).any(axis=0)).tolist():
        ids, chances = candidates.others(int(groups[row]), refused[:, row])
        if len(ids) == 0:
            raise ValueError(f"example {row} has no candidate for a wrong token")
        tokens[row] = rng.choice(ids, p=chances)
    return tokens
