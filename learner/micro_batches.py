"""How one draw of trajectories becomes state trees that are evaluated and freed one after another."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from learner.state_tree import TreeBatch, build_tree_batch


@dataclass(frozen=True)
class TreeSettings:
    """How trajectories become state trees (see `build_tree_batch`)."""

    backspace_id: int
    eos_id: int
    max_nodes_per_row: int
    max_positions: int


def build_micro_batches(batch: pa.RecordBatch, settings: TreeSettings) -> list[TreeBatch]:
    """State trees of a batch of trajectories; each log is in exactly one of them.

    Raises:
        ValueError: a trajectory cannot be a state tree (see `build_tree_batch`).
    """
    return [
        build_tree_batch(
            batch,
            backspace_id=settings.backspace_id,
            eos_id=settings.eos_id,
            max_nodes_per_row=settings.max_nodes_per_row,
            max_positions=settings.max_positions,
        )
    ]
