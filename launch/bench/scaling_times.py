"""How long each step of a run takes: what the simulation is given instead of engines, models and networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from buffer.settings import Settings
from launch.settings.files import read_json

TIMED_RECIPE = Path(__file__).parents[1] / "recipes" / "arithmetic_cpu.yaml"
"""Whose times the defaults are."""


class StepTimes(Settings):
    """Seconds of every step that is simulated.

    The defaults are those of `TIMED_RECIPE` with a core for each process; docs/results/cpu.md tells their origin.
    """

    decode_step_s: dict[PositiveInt, PositiveFloat] = Field(
        {1: 0.0044, 8: 0.0044, 64: 0.0082},
        min_length=1,
        description="one engine step, by the number of rollouts in it; between two numbers linear, below as the least",
    )
    prefill_s: float = Field(0.00015, ge=0.0, description="added to a step for each rollout that begins in it")
    actions_per_rollout: tuple[PositiveInt, ...] = Field(
        (4, 5, 5, 5), min_length=1, description="lengths of rollouts, all equally likely"
    )
    start_actor_s: float = Field(12.0, ge=0.0, description="from the pool's decision until an engine stands")
    load_weights_s: float = Field(0.01, ge=0.0, description="an actor stands still to take and check new weights")
    send_weights_s: float = Field(
        0.002, ge=0.0, description="weights travel to one node, one node after the other, once for its actors"
    )
    actors_per_node: PositiveInt = Field(8, description="actors that share what was sent to their node")
    publish_s: float = Field(0.01, ge=0.0, description="the learner stands still to publish")
    learner_step_s: float = Field(0.01, gt=0.0, description="of a learner step, whatever the batch and the ranks")
    learner_trajectory_s: float = Field(
        0.0007, ge=0.0, description="of a learner step for each trajectory, divided by the ranks"
    )
    insert_s: float = Field(0.003, ge=0.0, description="a shard is busy with an insert")
    insert_row_s: float = Field(0.0001, ge=0.0, description="... and as long for each of its trajectories")
    draw_s: float = Field(0.003, ge=0.0, description="a shard is busy with its part of a draw")
    draw_row_s: float = Field(0.00003, ge=0.0, description="... and as long for each of its trajectories")
    call_s: float = Field(0.001, ge=0.0, description="a call to another process and back, beside the work")

    def decode_s(self, num_rollouts: int, num_new: int) -> float:
        """Of an engine step with `num_rollouts` under way, of which `num_new` begin."""
        sizes = sorted(self.decode_step_s)
        step_s = float(np.interp(num_rollouts, sizes, [self.decode_step_s[size] for size in sizes]))
        return step_s + num_new * self.prefill_s

    def step_s(self, num_trajectories: int, ranks: int) -> float:
        """Of a learner step; each rank takes its share of the trajectories, rounded up."""
        return self.learner_step_s + self.learner_trajectory_s * -(-num_trajectories // ranks)


def read_times(path: Path) -> StepTimes:
    """Times from a JSON file; what it leaves out has its default.

    Raises:
        UserError: see `read_json`. ValueError: the file holds something else.
    """
    tree = read_json(path, "file of times")
    try:
        return StepTimes.model_validate(tree)
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(str(part) for part in detail["loc"])
        known = f" (known: {', '.join(StepTimes.model_fields)})" if detail["type"] == "extra_forbidden" else ""
        raise ValueError(f"{path}: {where + ': ' if where else ''}{detail['msg']}{known}") from None
