"""Backspace demonstrations: clean targets become trajectories with injected errors that are taken back at once.

With probability `rate` per target position, ... x_i, x_{i+1} ... becomes ... x_i, n, <backspace>, x_{i+1} ...
The noise token n is the environment's doing: the action at x_i keeps its label x_{i+1}, and n is stored as
what was *executed*. So one injected error makes three actions:

    state         action (label)   executed
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

from buffer.experts.ragged import Int32, Int64, Ragged

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class NoiseCandidates:
    """What noise tokens are drawn from: one distribution over ids per group of examples (say, per number base).

    token_ids: [C] ids of all groups, group after group. cumulative: [C] g + cumulative probability within group g, so
    that one sorted search serves every group. group_offsets: [G+1].
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
        """Each group's ids with chances proportional to its weights; ValueError where all of them are 0."""
        cumulative = []
        for index, (ids, weight) in enumerate(zip(groups, weights, strict=True)):
            if len(ids) != len(weight) or not weight.sum() > 0:
                raise ValueError(f"noise candidates of group {index}: {len(ids)} ids need one weight each, not all 0")
            cumulative.append(index + np.cumsum(weight) / weight.sum())
        offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in groups])]).astype(np.int64)
        return cls(np.concatenate(groups).astype(np.int32), np.concatenate(cumulative), offsets)

    def sample(self, groups: Int64, rng: np.random.Generator) -> Int32:
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


def insert_noise(
    targets: Ragged, positions: Int64, tokens: Int32, backspace_id: int, eos_ids: Sequence[int]
) -> tuple[Ragged, pa.ListArray]:
    """Plant `tokens` [K] before the target positions [K] (ascending, at most one each); void draws are left out.

    Gives the schema's `actions` and `executed` of each row. `executed` is null where it is equal to the action, and a
    null list where the whole row is.
    """
    assert len(positions) == len(tokens), "one noise token for each position"
    void = (tokens == targets.values[positions]) | np.isin(tokens, [*eos_ids, backspace_id])
    positions = positions[~void]
    width = np.ones(len(targets.values), dtype=np.int64)
    width[positions] = 3
    ends = np.concatenate([[0], np.cumsum(width)])
    actions = Ragged(ends[targets.offsets], np.repeat(targets.values, width))
    events = ends[positions]
    actions.values[events + 1] = backspace_id

    noisy_row = np.zeros(actions.num_rows, dtype=np.bool_)
    noisy_row[np.searchsorted(targets.offsets, positions, side="right") - 1] = True
    in_noisy_row = np.repeat(noisy_row, actions.lengths)
    executed, absent = np.zeros_like(actions.values), np.ones(len(actions.values), dtype=np.bool_)
    executed[events], absent[events] = tokens[~void], False
    values = pa.array(executed[in_noisy_row], pa.int32(), mask=absent[in_noisy_row])
    offsets = pa.array(np.concatenate([[0], np.cumsum(actions.lengths * noisy_row)]), pa.int32())
    return actions, pa.ListArray.from_arrays(offsets, values, mask=pa.array(~noisy_row))
