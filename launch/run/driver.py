"""The driver of a run: creates buffer, learner and actor pool on Ray, runs the stages, and ends all it started."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from actors.engine.settings import engine_environment
from actors.pool.ray_pool import ActorPool
from actors.rollout_actor import RolloutSpec
from buffer.experts.tasks import Task
from buffer.remote_call import RemoteCall, end_actor
from launch.cluster.capacity import RunCapacity
from launch.cluster.connection import run_cluster
from launch.command_errors import setting_up
from launch.errors import RunFailedError, UserError, lost_processes_reported
from launch.monitoring.live_view import LiveView, RunView
from launch.monitoring.run_log import RunLog
from launch.run.buffer_shards import check_buffer, start_buffer
from launch.run.checks import check_prepared, engine_length
from launch.run.learner_group import LearnerFailedError, LearnerGroup
from launch.run.supervision import POOL, Supervisor
from launch.run_folder.checkpoints import check_checkpoints, finished_stages, newest_published
from launch.run_folder.examples import check_examples
from launch.run_folder.folder import BUFFER_FOLDER
from launch.run_folder.tokenizer import save_run_tokenizer
from launch.settings.run import RunSettings, introduces_backspace, needs_actors
from launch.settings.trusted_code import check_trusted
from learner.messages import LearnerSpec, PreparedRun, StageResult
from learner.settings.stages import StageSettings, with_explicit_starts

START_TIMEOUT_S = 120.0
"""Of a process without a model; a busy machine takes long to import."""

PREPARE_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 60.0
END_TIMEOUT_S = 10.0
"""Of the actor pool, beyond the time that its actors have to finish."""

POOL_NAME = "pool"
"""Of the actor pool, within the namespace of the run."""


@dataclass(frozen=True)
class RunOutcome:
    """What a run left. finished: False where it was stopped on request; it can be resumed."""

    folder: Path
    results: dict[str, StageResult]
    finished: bool


def train(
    settings: RunSettings, folder: Path, console: Console, check_task: Callable[[Task], None] | None = None
) -> RunOutcome:
    """Run every stage that is not done yet. Ctrl-C ends the run after the current step, with a checkpoint.

    check_task: refuses, by a ValueError or an ImportError, a task that does not suit what is to follow.

    Raises:
        UserError: the settings cannot be met (model, task, cluster), or run code that nobody vouched for.
        RunFailedError: an actor or the learner could not go on; the message names who.
    """
    check_trusted(settings.scoring)
    check_checkpoints(settings, folder)
    view = RunView(folder.name, settings.stages, results=finished_stages(settings, folder))
    with lost_processes_reported(), LiveView(console, view) as live, RunLog(folder) as log:
        log.write("info", "driver", "run_started", "the run begins")
        view.note = "starting Ray"
        live.refresh()
        with run_cluster(settings, folder), RunCapacity(settings) as capacity:
            processes = RunProcesses(settings, folder, live, log, capacity)
            try:
                outcome = processes.run(check_task)
            finally:
                processes.stop()
            if outcome.finished:
                log.write("info", "driver", "run_finished", "the run is finished")
            else:
                log.write("info", "driver", "run_stopped", "the run was stopped")
            return outcome


class RunProcesses:
    """The processes of one run: the learner, and a buffer and actors where a stage needs them."""

    def __init__(self, settings: RunSettings, folder: Path, live: LiveView, log: RunLog, capacity: RunCapacity) -> None:
        self._settings = settings
        self._folder = folder
        self._live = live
        self._log = log
        self._capacity = capacity
        self._supervisor = Supervisor(settings, folder, live, log)
        self._stopping_since: float | None = None

    def run(self, check_task: Callable[[Task], None] | None) -> RunOutcome:
        """Start the processes and run the stages."""
        stages = with_explicit_starts(self._settings.stages)
        remaining = [stage for stage in stages if stage.name not in self._live.view.results]
        learner = self._start_learner()
        try:
            self._supervisor.note("loading model and task")
            run = self._prepare(learner, check_task)
            newest_version = newest_published(self._settings, self._folder, run.contract)
            check_examples(run.task, self._folder)
            if any(needs_actors(stage, self._settings.noise) for stage in remaining):
                self._start_actors(learner, run, newest_version)
            else:
                self._capacity.release_actors()
            self._supervisor.note("")
            for stage in remaining:
                result = self._run_stage(learner, stage)
                self._live.view.results[stage.name] = result
                if not result.finished or self._stopping_since is not None:
                    break
        except KeyboardInterrupt:  # between two stages: nothing is under way that a checkpoint does not hold
            pass
        return self._outcome()

    def stop(self) -> None:
        """End every process of the run, actors first so that their last rollouts reach the buffer."""
        learner, pool, buffer = self._supervisor.learner, self._supervisor.pool, self._supervisor.buffer
        lines: list[str | None] = []
        if pool is not None:
            drain_s = self._settings.actors.drain_timeout_s
            lines.append(end_actor(pool, RemoteCall(POOL, pool.stop.remote(drain_s), "stop"), drain_s + END_TIMEOUT_S))
        if buffer is not None:
            lines += buffer.close()
        for line in filter(None, lines):
            self._supervisor.warn(line)
        if learner is not None:
            learner.stop()

    def _outcome(self) -> RunOutcome:
        results = dict(self._live.view.results)
        done = [stage.name in results and results[stage.name].finished for stage in self._settings.stages]
        return RunOutcome(self._folder, results, finished=all(done))

    def _start_learner(self) -> LearnerGroup:
        settings = self._settings
        plan = self._capacity.reserve(self._wait_for_capacity)
        self._log.write("info", "driver", "processes_placed", f"the plan: {plan}")
        spec = LearnerSpec(
            model=settings.model,
            task=settings.task,
            noise=settings.noise,
            settings=settings.learner,
            run_folder=str(self._folder),
            seed=settings.seed,
            trackers=settings.trackers,
            prioritised_replay=settings.buffer.sampler == "prioritised",
            features=tuple(settings.scoring.features),
            offers_backspace=settings.actors.rollout.backspace,
        )
        learner = LearnerGroup(spec, self._capacity.learner)
        self._supervisor.learner = learner
        return learner

    def _wait_for_capacity(self, missing: str) -> None:
        note = f"waiting for room: {missing}"
        if self._live.view.note != note:
            self._log.write("info", "driver", "room_awaited", note, {"missing": missing})
        self._supervisor.note(note)

    def _prepare(self, learner: LearnerGroup, check_task: Callable[[Task], None] | None) -> PreparedRun:
        if self._settings.learner.num_ranks > 1:
            learner.join().wait(START_TIMEOUT_S, self._live.refresh)
        try:
            run = learner.prepare().wait(PREPARE_TIMEOUT_S, self._live.refresh)
        except LearnerFailedError as error:
            if isinstance(error.cause, ValueError | OSError | ImportError):
                raise UserError(str(error.cause)) from None
            raise
        assert isinstance(run, PreparedRun)
        check_prepared(self._settings, run, check_task)
        with setting_up():
            save_run_tokenizer(run.task.tokenizer, self._folder)
        return run

    def _start_actors(self, learner: LearnerGroup, run: PreparedRun, newest_version: int) -> None:
        settings, folder = self._settings, self._folder / BUFFER_FOLDER
        check_buffer(folder, run.contract, settings.buffer)
        buffer = start_buffer(folder, run.contract, settings.buffer, settings.seed)
        self._supervisor.buffer = buffer
        spec = RolloutSpec(
            config_json=run.config_json,
            contract=run.contract,
            task=run.task.name,
            settings=settings.actors,
            noise=settings.noise,
            max_length=engine_length(settings, run),
            scoring=settings.scoring if settings.scoring.scorers else None,
            tokenizer=run.task.tokenizer,
        )
        # Not on a node that only holds actors: it would be lost with that node, and the run with it.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        pool = (
            ray.remote(ActorPool)
            .options(name=POOL_NAME, num_cpus=0, scheduling_strategy=here)
            .remote(
                spec,
                [ray.put(run.task.example_table())],
                buffer.shards,
                engine_environment(spec.engine_settings("", seed=0)),
                settings.actors.count,
            )
        )
        self._supervisor.pool = pool
        self._call_pool(pool.pause.remote(), "pause")  # until the learner has published the weights of the first stage
        self._call_pool(pool.start.remote(self._capacity.release_actors()), "start")
        first_version = max(buffer.newest_version(START_TIMEOUT_S, self._live.refresh), newest_version) + 1
        learner.connect(buffer.shards, pool, first_version).wait(PREPARE_TIMEOUT_S, self._live.refresh)

    def _call_pool(self, reference: ray.ObjectRef[None], task: str) -> None:
        RemoteCall[None](POOL, reference, task).result(START_TIMEOUT_S, self._live.refresh)

    def _run_stage(self, learner: LearnerGroup, stage: StageSettings) -> StageResult:
        if self._supervisor.pool is not None:  # no new rollouts, until the learner has published where the stage starts
            self._call_pool(self._supervisor.pool.pause.remote(), "pause")
        call = learner.run_stage(stage, introduces_backspace(self._settings, stage))
        while True:
            try:
                result = call.wait(math.inf, self._look_after)
                assert isinstance(result, StageResult)
                return result
            except LearnerFailedError as error:
                losses = "" if self._live.view.pool is None else self._live.view.pool.losses()
                if isinstance(error.cause, TimeoutError) and losses:
                    raise RunFailedError(f"{error}; {losses}") from error
                raise
            except KeyboardInterrupt:
                if self._stopping_since is not None:
                    raise RunFailedError("stopped by a second Ctrl-C, without a last checkpoint") from None
                self._stopping_since = time.monotonic()
                self._live.say("stopping after this step, with a checkpoint (Ctrl-C again to stop at once)")
                learner.request_stop()

    def _look_after(self) -> None:
        """What is done every moment while a stage runs."""
        self._supervisor.refresh(autoscaling=self._stopping_since is None)
        if self._stopping_since is not None and time.monotonic() - self._stopping_since > STOP_TIMEOUT_S:
            raise RunFailedError(f"the learner did not stop within {STOP_TIMEOUT_S:.0f} s")
