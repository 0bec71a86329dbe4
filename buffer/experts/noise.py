"""Backspace demonstrations: clean targets become action logs with planted mistakes that are taken back at
once.

With probability `rate` per target position, ... x_i, x_{i+1} ... becomes ... x_i, n, <backspace>, x_{i+1} ...
The noise token n is the environment's doing: the action at x_i keeps its label x_{i+1}, and n is stored as
what was *realised*. So one planted mistake makes three actions:

    state         action (label)   realised
    s_i           x_{i+1}          n
    s_i n         <backspace>      <backspace>
    s_i           x_{i+1}          x_{i+1}

There is one draw per position, the one before `<eos>` included, and none after the backspace. A draw equal to
the label, to `<eos>` or to backspace is void, or a right token would be shown as a mistake. (SequenceMatch,
section on backspace demonstrations.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from buffer.experts.ragged import Int32, Int64, Ragged, index_ranges

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class NoiseCandidates:
    """What noise tokens are drawn from: one distribution over ids per group of examples (say, per number
    base).

    token_ids: [C] ids of all groups, group after group. cumulative: [C] g + cumulative probability within
    group g, so that one sorted search serves every group. group_offsets: [G+1].
    """

    token_ids: Int32
    cumulative: Float64
    group_offsets: Int64

    @classmethod
    def uniform(cls, groups: list[Int32]) -> NoiseCandidates:
        """Each group's ids, equally likely."""
        return cls.weighted(groups, [np.ones(len(ids)) for ids in groups])

    @classmethod
    def weighted(cls, groups: list[Int32], weights: list[Float64]) -> NoiseCandidates:
        """Each group's ids with chances proportional to its weights.

        Raises:
            ValueError: a group has no id of positive weight.
        """
        cumulative = []
        for index, (ids, weight) in enumerate(zip(groups, weights, strict=True)):
            if len(ids) != len(weight) or not weight.sum() > 0:
                raise ValueError(f"noise candidates of group {index}: {len(ids)} ids need one weight each, not all 0")
            cumulative.append(index + np.cumsum(weight) / weight.sum())
        offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in groups])]).astype(np.int64)
        return cls(np.concatenate(groups).astype(np.int32), np.concatenate(cumulative), offsets)

    def draw(self, groups: Int64, rng: np.random.Generator) -> Int32:
        """[K] one id for each of the groups [K] (a single group serves all); takes exactly K doubles from `rng`."""
        if len(self.group_offsets) == 2:
            groups = np.zeros_like(groups)
        found = np.searchsorted(self.cumulative, groups + rng.random(len(groups)), side="right")
        # A sum that rounds up to the next whole number belongs to the last id of its own group.
        tokens: Int32 = self.token_ids[np.minimum(found, self.group_offsets[groups + 1] - 1)]
        return tokens

    def others(self, group: int, refused: npt.ArrayLike) -> tuple[Int32, Float64]:
        """([n], [n]) a group's ids without the `refused` ones, and the chances of each among them; n may be 0."""
        group = 0 if len(self.group_offsets) == 2 else group
        members = slice(self.group_offsets[group], self.group_offsets[group + 1])
        weights = np.diff(self.cumulative[members], prepend=group)
        allowed = (weights > 0) & ~np.isin(self.token_ids[members], refused)
        return self.token_ids[members][allowed], weights[allowed] / max(weights[allowed].sum(), np.finfo(float).tiny)


@dataclass(frozen=True)
class NoisyLogs:
    """Action logs with planted mistakes. A actions over all rows, K of them with a noise token in their
    place.

    actions: labels. noise_events: [K] flat indexes into the actions. noise_tokens: [K]. num_void: draws that
    a label, `<eos>` or backspace made void.
    """

    actions: Ragged
    noise_events: Int64
    noise_tokens: Int32
    num_void: int

    def realised_column(self) -> pa.ListArray:
        """The schema's `realised`: null where equal to the action, and a null list where the whole row is."""
        lengths = self.actions.lengths
        row = np.searchsorted(self.actions.offsets, self.noise_events, side="right") - 1
        noisy_row = np.zeros(len(lengths), dtype=np.bool_)
        noisy_row[row] = True
        where_kept = np.repeat(noisy_row, lengths)
        tokens = np.zeros(len(self.actions.values), dtype=np.int32)
        tokens[self.noise_events] = self.noise_tokens
        absent = np.ones(len(tokens), dtype=np.bool_)
        absent[self.noise_events] = False
        values = pa.array(tokens[where_kept], pa.int32(), mask=absent[where_kept])
        offsets = np.concatenate([[0], np.cumsum(lengths * noisy_row)])
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, mask=pa.array(~noisy_row))


def choose_noise_positions(num_positions: int, rate: float, rng: np.random.Generator) -> Int64:
    """Ascending flat indexes of the target positions that get a draw; takes `num_positions` doubles."""
    return np.flatnonzero(rng.random(num_positions) < rate)


def prefixes_at(prompts: Ragged, targets: Ragged, positions: Int64) -> Ragged:
    """The text before each target position: what a policy must continue by one token to make the noise
    itself.

    prompts, targets: R rows each. positions: [K] flat indexes into the targets. Returns K rows: prompt and
    target so far.
    """
    row = np.searchsorted(targets.offsets, positions, side="right") - 1
    prompt_lengths = prompts.lengths[row]
    answer_lengths = positions - targets.offsets[row]
    prefixes = Ragged.from_lengths(
        prompt_lengths + answer_lengths,
        np.empty(int(prompt_lengths.sum() + answer_lengths.sum()), dtype=np.int32),
    )
    prompt_slots = index_ranges(prefixes.offsets[:-1], prompt_lengths)
    answer_slots = index_ranges(prefixes.offsets[:-1] + prompt_lengths, answer_lengths)
    prefixes.values[prompt_slots] = prompts.values[index_ranges(prompts.offsets[:-1][row], prompt_lengths)]
    prefixes.values[answer_slots] = targets.values[index_ranges(targets.offsets[:-1][row], answer_lengths)]
    return prefixes


def insert_noise(
    targets: Ragged, positions: Int64, tokens: Int32, backspace_id: int, eos_ids: Sequence[int]
) -> NoisyLogs:
    """Plant `tokens` [K] before the target positions [K] (ascending, at most one each); void draws are left
    out.

    Raises:
        ValueError: the numbers of positions and tokens differ.
    """
    if len(positions) != len(tokens):
        raise ValueError(f"{len(positions)} noise positions need as many tokens, not {len(tokens)}")
    void = (tokens == targets.values[positions]) | np.isin(tokens, [*eos_ids, backspace_id])
    positions, tokens = positions[~void], tokens[~void].astype(np.int32, copy=False)
    width = np.ones(len(targets.values), dtype=np.int64)
    width[positions] = 3
    ends = np.concatenate([[0], np.cumsum(width)])
    actions = np.repeat(targets.values, width)
    noise_events = ends[positions]
    actions[noise_events + 1] = backspace_id
    return NoisyLogs(Ragged(ends[targets.offsets], actions), noise_events, tokens, int(void.sum()))
