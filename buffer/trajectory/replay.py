"""Replay of trajectories: from the actions of many trajectories to the states they pass through, without a Python loop.

A trajectory without a backspace at the floor never clips, so the depth of the text after each action is a running sum
of +1 (append) and -1 (backspace). The text at depth d after an action is the newest append that reached depth d: sorted
by (trajectory, depth, time), that is a running maximum over append positions. Both are plain vector operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]

FLOOR = -1
"""Event index that stands for the empty answer (the end of the prompt)."""


@dataclass(frozen=True)
class TrajectoryArrays:
    """Ragged trajectories as flat arrays. L trajectories, A actions over all trajectories, P prompt tokens over all
    trajectories.

    offsets: [L+1] trajectory i owns actions offsets[i]:offsets[i+1].
    actions: [A] ids as chosen; executed: [A] ids as appended by the environment (equal to actions without noise).
    prompt_offsets: [L+1], prompt_ids: [P].
    """

    offsets: Int64
    actions: Int32
    executed: Int32
    prompt_offsets: Int64
    prompt_ids: Int32

    @property
    def num_trajectories(self) -> int:
        """L."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int64:
        """[L] actions per trajectory."""
        return np.diff(self.offsets)

    @classmethod
    def from_batch(cls, batch: pa.RecordBatch) -> TrajectoryArrays:
        """View the list columns of a trajectory batch; copies only where `executed` differs from `actions`."""
        offsets, actions = _flatten(batch.column("actions"))
        executed = actions
        column = batch.column("executed")
        if column.null_count < len(column):
            executed, values = actions.copy(), column.flatten()
            present = np.repeat(column.is_valid().to_numpy(zero_copy_only=False), np.diff(offsets))
            noisy = np.flatnonzero(present)[values.is_valid().to_numpy(zero_copy_only=False)]
            executed[noisy] = values.drop_null().to_numpy()
        return cls(offsets, actions, executed, *_flatten(batch.column("prompt_ids")))


def _flatten(column: pa.ListArray) -> tuple[Int64, Int32]:
    offsets = column.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0], column.values.slice(offsets[0], offsets[-1] - offsets[0]).to_numpy()


@dataclass(frozen=True)
class Replay:
    """States of replayed trajectories. Events are indexes into the flat actions; FLOOR is the end of the prompt.

    trajectory: [A] log of each action. time: [A] index of the action within its trajectory.
    depth: [A] answer length *after* the action.
    state: [A] event whose append made the last answer token *before* the action, or FLOOR.
    next_state: [A] the same *after* the action.
    """

    trajectory: Int64
    time: Int64
    depth: Int64
    state: Int64
    next_state: Int64


def replay(trajectories: TrajectoryArrays, backspace_id: int) -> Replay:
    """Replay all trajectories: backspace takes the last token back, every other *executed* id is appended. ValueError
    where a trajectory takes a token back at the floor."""
    num_actions = len(trajectories.actions)
    trajectory = np.repeat(np.arange(trajectories.num_trajectories), trajectories.lengths)
    time = np.arange(num_actions) - trajectories.offsets[:-1][trajectory]
    is_append = trajectories.executed != backspace_id
    running = np.cumsum(np.where(is_append, 1, -1))
    before_trajectory = np.concatenate([[0], running])[trajectories.offsets[:-1]]
    depth = running - before_trajectory[trajectory]
    if depth.min(initial=0) < 0:
        bad = int(trajectory[np.argmin(depth)])
        raise ValueError(f"trajectory {bad} takes a token back at the floor (the end of its prompt)")
    # Sorted by (trajectory, depth, time), the state after an action at depth d is the newest append to depth d so far.
    order = np.lexsort((time, depth, trajectory))
    newest = np.maximum.accumulate(np.where(is_append[order], np.arange(num_actions), -1))
    next_state = np.empty(num_actions, dtype=np.int64)
    next_state[order] = order[newest]
    next_state[depth == 0] = FLOOR
    state = np.concatenate([[FLOOR], next_state[:-1]])[:num_actions]
    state[time == 0] = FLOOR
    return Replay(trajectory=trajectory, time=time, depth=depth, state=state, next_state=next_state)


def final_token_ids(trajectories: TrajectoryArrays, played: Replay, backspace_id: int) -> tuple[Int64, Int32]:
    """What is left of every answer at the end of its trajectory: offsets [L+1] and token ids."""
    kept = surviving_events(trajectories, played, backspace_id)
    counts = np.bincount(played.trajectory[kept], minlength=trajectories.num_trajectories)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return offsets, trajectories.executed[kept]


def surviving_events(trajectories: TrajectoryArrays, played: Replay, backspace_id: int) -> npt.NDArray[np.bool_]:
    """[A] True for appends that are still there at the end of their trajectory.

    An append that reached depth d survives iff every later depth of its trajectory is >= d: compare with the reversed
    running minimum, restarted per trajectory by an offset that no depth reaches.
    """
    span = int(played.depth.max(initial=0)) + 2
    shifted = played.depth + played.trajectory * span
    later_minimum = np.minimum.accumulate(shifted[::-1])[::-1]
    survives: npt.NDArray[np.bool_] = (trajectories.executed != backspace_id) & (later_minimum >= shifted)
    return survives
