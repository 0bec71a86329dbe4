"""What a run would do with other numbers of actors and learner ranks, by simulation.

Real are the decisions and the data: the pool's roster, the rules of an actor, the shards with their stores and files,
limiter, samplers and staleness, the router of draws. Simulated is what takes time: engine steps, learner steps, ways
between processes (`launch.bench.scaling_times`), each process on hardware of its own. All of it lives on one event loop
whose clock jumps, so an hour of a cluster takes as long as its inserts and draws do.
"""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.rollout_rules import GENERATING, HELD_BACK
from actors.settings import ActorsSettings
from buffer.service.router import DrawTimeoutError
from buffer.service.status import BufferStatus
from buffer.settings import BufferSettings
from buffer.store.counters import SourceCounters
from launch.bench.scaling_actor import INSERTING, LOADING
from launch.bench.scaling_learner import SimulatedLearner
from launch.bench.scaling_pool import SimulatedPool
from launch.bench.scaling_shards import open_shards
from launch.bench.scaling_times import StepTimes
from launch.bench.virtual_time import VirtualTimeLoop
from launch.settings.run import RunSettings
from learner.settings.stages import LearnerSettings, StageSettings


@dataclass(frozen=True)
class ScalingPlan:
    """What is simulated at every point. steps: of the learner that are measured, after `warmup` others."""

    actors: ActorsSettings
    buffer: BufferSettings
    stage: StageSettings
    learner: LearnerSettings
    times: StepTimes
    steps: int
    warmup: int
    seed: int

    def with_batches_of(self, ranks: int) -> ScalingPlan:
        """The same for each of `ranks` ranks: as many times the batches, and a buffer as many times as large."""
        buffer, stage = self.buffer, self.stage
        tolerance = buffer.samples_per_insert_tolerance
        sizes = {"capacity": buffer.capacity * ranks, "min_size": buffer.min_size * ranks}
        batches = {"batch_size": stage.batch_size * ranks, "rollout_batch_size": stage.rollout_batch_size * ranks}
        more = {"samples_per_insert_tolerance": None if tolerance is None else tolerance * ranks}
        return dataclasses.replace(
            self, buffer=buffer.model_copy(update=sizes | more), stage=stage.model_copy(update=batches)
        )


@dataclass(frozen=True)
class ScalingPoint:
    """What one number of actors and ranks did. Rates and shares are those of the measured steps.

    actors: at the start; `actors_at_end`: after the last step, where `actors.autoscale` changes their number.
    virtual_s: how long the steps took. actions_per_s: of all engines; samples_per_s: rows drawn. staleness: in
    published versions. dropped_share: of the inserted rows, dropped as stale. actors_*: share of the actors' time;
    learner_*: of the learner's. buffer_busy: of the busiest shard's time. join_s: until every actor was at work.
    saturated: what has no time to spare: actors, learner, buffer or push. inserted, live, removed: rows of the whole
    simulation. failure: why a real run would have ended; the rates are those before that.
    """

    actors: int
    ranks: int
    virtual_s: float
    steps_per_s: float
    actions_per_s: float
    inserts_per_s: float
    samples_per_s: float
    samples_per_insert: float | None
    staleness_mean: float
    staleness_max: int
    dropped_share: float
    actors_generating: float
    actors_loading: float
    actors_held_back: float
    actors_inserting: float
    learner_training: float
    learner_publishing: float
    learner_waiting: float
    buffer_busy: float
    join_s: float | None
    actors_at_end: int
    saturated: str
    inserted: int
    drawn: int
    live: int
    removed: dict[str, int]
    failure: str | None


def make_plan(
    settings: RunSettings, stage_name: str | None, times: StepTimes, steps: int, warmup: int | None
) -> ScalingPlan:
    """The part of a recipe that can be simulated.

    stage_name: a stage with rollouts; None = the first. warmup: None = until the buffer has been drawn twice over.

    Raises:
        ValueError: there is no such stage, or the simulation cannot do what the recipe asks for.
    """
    stages = {stage.name: stage for stage in settings.stages if stage.objective.needs_rollouts}
    if not stages:
        raise ValueError(f"no stage of {settings.name!r} draws rollouts, so there is nothing to simulate")
    stage = stages.get(stage_name or next(iter(stages)))
    if stage is None:
        raise ValueError(f"{stage_name!r} is no stage that draws rollouts; those are: {', '.join(stages)}")
    if settings.noise.kind == "policy" and stage.objective.uses_noise:
        raise ValueError("simulated actors make no expert trajectories: choose another noise.kind than policy")
    largest = max(times.decode_step_s)
    if settings.actors.max_concurrent > largest:
        raise ValueError(
            f"actors.max_concurrent={settings.actors.max_concurrent}, but the times tell decode_step_s for {largest} "
            "rollouts at most: measure it for as many, or lower actors.max_concurrent"
        )
    if warmup is None:
        warmup = 2 * -(-settings.buffer.capacity // stage.rollout_batch_size)
    return ScalingPlan(settings.actors, settings.buffer, stage, settings.learner, times, steps, warmup, settings.seed)


def simulate(plan: ScalingPlan, num_actors: int, num_ranks: int, folder: Path) -> ScalingPoint:
    """One point. folder: a new one, for the files of the buffer; they stay. Equal arguments give equal points."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(_Simulation(plan, num_actors, num_ranks, folder).run())


def bench_scaling(
    plan: ScalingPlan,
    actors: Sequence[int],
    ranks: Sequence[int],
    batch_per_rank: bool,
    on_point: Callable[[int, int], None],
) -> dict[str, object]:
    """Every number of actors with every number of ranks. batch_per_rank: batches and buffer grow with the ranks.
    on_point: told actors and ranks before a point is simulated.

    Returns:
        `points`: `ScalingPoint` as dictionaries, and what they were simulated with.
    """
    points = []
    for num_ranks in ranks:
        sized = plan.with_batches_of(num_ranks) if batch_per_rank else plan
        for num_actors in actors:
            on_point(num_actors, num_ranks)
            with tempfile.TemporaryDirectory() as folder:
                points.append(dataclasses.asdict(simulate(sized, num_actors, num_ranks, Path(folder, "buffer"))))
    return {
        "simulated": True,
        "stage": plan.stage.name,
        "steps": plan.steps,
        "warmup": plan.warmup,
        "batch_per_rank": batch_per_rank,
        "times": plan.times.model_dump(mode="json"),
        "points": points,
    }


@dataclass(frozen=True)
class _Reading:
    """All counters at one moment."""

    at_s: float
    steps: int
    actions: int
    actors_s: dict[str, float]
    learner_s: tuple[float, float, float]
    buffer_s: tuple[float, ...]
    rows: SourceCounters


class _Simulation:
    def __init__(self, plan: ScalingPlan, num_actors: int, num_ranks: int, folder: Path) -> None:
        self._plan = plan
        self._num_actors = num_actors
        self._num_ranks = num_ranks
        self._folder = folder

    async def run(self) -> ScalingPoint:
        plan = self._plan
        shards = open_shards(self._folder, plan.buffer, plan.times, plan.seed)
        pool = SimulatedPool(self._num_actors, plan.actors, plan.times, shards, plan.seed)
        learner = SimulatedLearner(plan.stage, plan.learner, plan.times, shards, pool.crew.announce, self._num_ranks)
        self._parts = (shards, pool, learner)
        await learner.publish()
        failure = None
        async with asyncio.TaskGroup() as group:
            supervision = group.create_task(pool.supervise())
            joined = group.create_task(self._wait_for_all())
            begin = await self._read()
            try:
                while not joined.done() or learner.steps < plan.warmup:
                    await learner.train_step()
                begin = await self._read()
                learner.staleness_sum = learner.staleness_max = 0
                while learner.steps < begin.steps + plan.steps:
                    await learner.train_step()
            except DrawTimeoutError as error:
                failure = pool.roster.failure or str(error)
            end = await self._read()
            supervision.cancel()
            num_at_end = pool.roster.desired
            join_s = joined.result() if joined.done() else None
            joined.cancel()
        await pool.stop()
        rows = (await self._read()).rows
        for shard in shards:
            await shard.service.close()
        return self._point(begin, end, rows, join_s, num_at_end, failure)

    async def _wait_for_all(self) -> float:
        _, pool, _ = self._parts
        while not pool.complete:
            await asyncio.sleep(0.1)
        return asyncio.get_running_loop().time()

    async def _read(self) -> _Reading:
        shards, pool, learner = self._parts
        status = BufferStatus(tuple([await shard.service.status() for shard in shards]))
        return _Reading(
            at_s=asyncio.get_running_loop().time(),
            steps=learner.steps,
            actions=pool.crew.actions,
            actors_s=pool.crew.spent_s,
            learner_s=(learner.step_s, learner.publish_s, learner.wait_s),
            buffer_s=tuple(shard.busy_s for shard in shards),
            rows=status.sources["policy"],
        )

    def _point(
        self,
        begin: _Reading,
        end: _Reading,
        rows: SourceCounters,
        join_s: float | None,
        num_at_end: int,
        failure: str | None,
    ) -> ScalingPoint:
        elapsed_s = end.at_s - begin.at_s
        drawn, inserted = end.rows.drawn - begin.rows.drawn, end.rows.inserted - begin.rows.inserted
        dropped = end.rows.dropped_stale - begin.rows.dropped_stale
        training, publishing, waiting = (
            (after - before) / elapsed_s for before, after in zip(begin.learner_s, end.learner_s, strict=True)
        )
        spent_s = {activity: seconds - begin.actors_s.get(activity, 0.0) for activity, seconds in end.actors_s.items()}
        work_s = sum(spent_s.values())  # of those that stood; with autoscaling their number changes
        actors = {
            activity: spent_s.get(activity, 0.0) / work_s if work_s else 0.0
            for activity in (GENERATING, LOADING, HELD_BACK, INSERTING)
        }
        buffer_busy = max(
            (after - before) / elapsed_s for before, after in zip(begin.buffer_s, end.buffer_s, strict=True)
        )
        _, _, learner = self._parts
        return ScalingPoint(
            actors=self._num_actors,
            ranks=self._num_ranks,
            virtual_s=elapsed_s,
            steps_per_s=(end.steps - begin.steps) / elapsed_s,
            actions_per_s=(end.actions - begin.actions) / elapsed_s,
            inserts_per_s=inserted / elapsed_s,
            samples_per_s=drawn / elapsed_s,
            samples_per_insert=drawn / inserted if inserted else None,
            staleness_mean=learner.staleness_sum / drawn if drawn else 0.0,
            staleness_max=learner.staleness_max,
            dropped_share=dropped / inserted if inserted else 0.0,
            actors_generating=actors[GENERATING],
            actors_loading=actors[LOADING],
            actors_held_back=actors[HELD_BACK],
            actors_inserting=actors[INSERTING],
            learner_training=training,
            learner_publishing=publishing,
            learner_waiting=waiting,
            buffer_busy=buffer_busy,
            join_s=join_s,
            actors_at_end=num_at_end,
            saturated=_saturated(actors, training, publishing, buffer_busy),
            inserted=rows.inserted,
            drawn=rows.drawn,
            live=rows.live,
            removed=rows.removed,
            failure=failure,
        )


def _saturated(actors: dict[str, float], training: float, publishing: float, buffer_busy: float) -> str:
    """What has the least time to spare; of the actors' and the learner's, the larger of work and weights counts."""
    actors_s, learner_s = actors[GENERATING] + actors[LOADING], training + publishing
    busiest = max(actors_s, learner_s, buffer_busy)
    if busiest == buffer_busy:
        return "buffer"
    if busiest == learner_s:
        return "learner" if training >= publishing else "push"
    return "actors" if actors[GENERATING] >= actors[LOADING] else "push"
