"""What a rollout actor decides without its engine and without Ray, as rules that a simulation can follow too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

SUPERVISION_INTERVAL_S = 0.5
"""Between two looks of the pool at its members."""

IDLE_WAIT_S = 0.2
"""Longest time that an actor without work stays away from asking again whether it may go on."""

STARTING = "starting"
WAITING_FOR_WEIGHTS = "waiting for weights"
DRAINING = "draining"
PAUSED = "paused"
FINISHING = "finishing rollouts before new weights"
HELD_BACK = "ahead of the learner"
GENERATING = "generating"

WeightUpdate = Literal["in_flight", "drain"]
"""When an actor loads new weights: see `actors.weight_update`."""


def finishes_first(weight_update: WeightUpdate, newest_version: int, version: int, num_unfinished: int) -> bool:
    """Whether rollouts that are under way keep the weights that they were started with; the new ones wait.

    newest_version: of the announced weights, version: of the loaded ones.
    """
    return weight_update == "drain" and newest_version > version and num_unfinished > 0


def rollout_activity(
    version: int,
    first_version: int,
    draining: bool,
    paused: bool,
    held_back: Callable[[], bool],
    finishing: bool = False,
) -> str:
    """What an actor does between two engine steps; new rollouts are started with `GENERATING` only.

    version: of the loaded weights. first_version: that the present stage asks for. held_back: whether every shard asked
        for a pause; it is not called where another reason suffices. finishing: see `finishes_first`.
    """
    if finishing:
        return FINISHING
    if version < first_version:
        return WAITING_FOR_WEIGHTS
    if draining:
        return DRAINING
    if paused:
        return PAUSED
    return HELD_BACK if held_back() else GENERATING


def hand_over_due(num_finished: int, num_unfinished: int, insert_rows: int) -> bool:
    """Whether finished rollouts are to go to the buffer: enough for an insert, or nothing else is under way."""
    return num_finished >= insert_rows or num_unfinished == 0
