"""What is simulated: a part of a recipe, and how long each step of it takes."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError

from actors.settings import ActorsSettings
from buffer.settings import BufferSettings, Settings
from launch.errors import UserError
from launch.settings.recipe import explain, read_text
from launch.settings.run import RunSettings
from learner.settings.stages import LearnerSettings, StageSettings

TIMED_RECIPE = Path(__file__).parents[2] / "launch/recipes/arithmetic_cpu.yaml"
"""Whose times the defaults are."""


class StepTimes(Settings):
    """Seconds of every step that is simulated.

    The defaults are those of `TIMED_RECIPE` with a core for each process; docs/results/cpu.md tells their origin.
    """

    # One engine step, by the number of rollouts in it; between two numbers linear, below as the least.
    decode_step_s: dict[PositiveInt, PositiveFloat] = Field({1: 0.0044, 8: 0.0044, 64: 0.0082}, min_length=1)
    prefill_s: NonNegativeFloat = 0.00015  # added to a step for each rollout that begins in it
    actions_per_rollout: tuple[PositiveInt, ...] = Field((4, 5, 5, 5), min_length=1)  # lengths, all equally likely
    start_actor_s: NonNegativeFloat = 12.0  # from the pool's decision until an engine stands
    load_weights_s: NonNegativeFloat = 0.01  # an actor stands still to take and check new weights
    send_weights_s: NonNegativeFloat = 0.002  # weights travel to one node after the other, once for its actors
    actors_per_node: PositiveInt = 8  # actors that share what was sent to their node
    publish_s: NonNegativeFloat = 0.01  # the learner stands still to publish
    learner_step_s: PositiveFloat = 0.01  # of a learner step, whatever the batch and the ranks
    learner_trajectory_s: NonNegativeFloat = 0.0007  # ... and for each trajectory, divided by the ranks
    insert_s: NonNegativeFloat = 0.003  # a shard is busy with an insert
    insert_row_s: NonNegativeFloat = 0.0001  # ... and as long for each of its trajectories
    draw_s: NonNegativeFloat = 0.003  # a shard is busy with its part of a draw
    draw_row_s: NonNegativeFloat = 0.00003  # ... and as long for each of its trajectories
    call_s: NonNegativeFloat = 0.001  # a call to another process and back, beside the work

    def decode_s(self, num_rollouts: int, num_new: int) -> float:
        """Of an engine step with `num_rollouts` under way, of which `num_new` begin."""
        sizes = sorted(self.decode_step_s)
        step_s = float(np.interp(num_rollouts, sizes, [self.decode_step_s[size] for size in sizes]))
        return step_s + num_new * self.prefill_s

    def step_s(self, num_trajectories: int, ranks: int) -> float:
        """Of a learner step; each rank takes its share of the trajectories, rounded up."""
        return self.learner_step_s + self.learner_trajectory_s * -(-num_trajectories // ranks)


@dataclass(frozen=True)
class Plan:
    """What is simulated at every point. steps: of the learner that are measured, after `warmup` others."""

    actors: ActorsSettings
    buffer: BufferSettings
    stage: StageSettings
    learner: LearnerSettings
    times: StepTimes
    steps: int
    warmup: int
    seed: int

    def with_batches_of(self, ranks: int) -> Plan:
        """The same for each of `ranks` ranks: as many times the batches, and a buffer as many times as large."""
        buffer, stage = self.buffer, self.stage
        tolerance = buffer.samples_per_insert_tolerance
        sizes = {"capacity": buffer.capacity * ranks, "min_size": buffer.min_size * ranks}
        batches = {"batch_size": stage.batch_size * ranks, "rollout_batch_size": stage.rollout_batch_size * ranks}
        more = {"samples_per_insert_tolerance": None if tolerance is None else tolerance * ranks}
        return replace(self, buffer=buffer.model_copy(update=sizes | more), stage=stage.model_copy(update=batches))


def make_plan(
    settings: RunSettings, stage_name: str | None, times: StepTimes, steps: int, warmup: int | None = None
) -> Plan:
    """The part of a recipe that can be simulated.

    stage_name: a stage with rollouts; None = the first. warmup: None = until the buffer has been drawn twice over.

    Raises:
        UserError: there is no such stage, or the simulation cannot do what the recipe asks for.
    """
    stages = {stage.name: stage for stage in settings.stages if stage.objective.needs_rollouts}
    stage = next(iter(stages.values()), None) if stage_name is None else stages.get(stage_name)
    if stage is None:
        raise UserError(f"stage {stage_name or ''} draws no rollouts; those that do are: {', '.join(stages) or 'none'}")
    if settings.noise.kind == "policy" and stage.objective.uses_noise:
        raise UserError("simulated actors make no expert trajectories: choose another noise.kind than policy")
    actors, largest = settings.actors, max(times.decode_step_s)
    if actors.max_concurrent > largest:
        raise UserError(
            f"the times tell decode_step_s for {largest} rollouts at most: measure it for actors.max_concurrent="
            f"{actors.max_concurrent}, or lower that"
        )
    if times.start_actor_s > actors.start_timeout_s:
        raise UserError(
            f"start_actor_s={times.start_actor_s:g} is more than actors.start_timeout_s={actors.start_timeout_s:g}: no "
            "engine would start; raise the latter"
        )
    if warmup is None:
        warmup = 2 * -(-settings.buffer.capacity // stage.rollout_batch_size)
    return Plan(actors, settings.buffer, stage, settings.learner, times, steps, warmup, settings.seed)


def read_times(path: Path) -> StepTimes:
    """Times from a JSON file; what it leaves out has its default. UserError if it holds something else."""
    try:
        tree = json.loads(read_text(path, "file of times"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    try:
        return StepTimes.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, tree)}") from None
