"""The driver of a run: creates buffer, learner and actor pool on Ray, runs the stages, and ends all it started.

While a stage runs, the driver polls the status of all processes, shows and logs it, and adapts the number of actors.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from actors.engine.interface import engine_environment
from actors.pool.autoscaler import Autoscaler, Observation
from actors.pool.controller import PoolStatus
from actors.pool.ray_pool import ActorPool
from actors.rollout_actor import RolloutSpec
from buffer.experts.tasks import Task
from buffer.processes import NoAnswerError, RemoteCall, end_actor
from buffer.service.client import BufferClient
from launch.cluster.capacity import RunCapacity
from launch.cluster.connection import run_cluster
from launch.errors import RunFailedError, UserError, lost_processes_reported, setting_up
from launch.monitoring.live_view import LiveView, RunView
from launch.monitoring.metrics import MetricExporter
from launch.monitoring.run_log import RunLog
from launch.run.buffer_shards import STATUS_TIMEOUT_S as SHARD_TIMEOUT_S
from launch.run.buffer_shards import ShardWatch, check_buffer, start_buffer
from launch.run.checks import check_custom_parts, check_prepared, engine_length
from launch.run.held_out import HeldOutQuestions, questions_of
from launch.run.learner_group import LearnerFailedError, LearnerGroup, learner_status
from launch.run_folder.checkpoints import check_checkpoints, finished_stages, newest_published
from launch.run_folder.folder import BUFFER_FOLDER
from launch.run_folder.task import check_examples, save_run_tokenizer
from launch.settings.run import RunSettings, introduces_backspace, needs_actors
from learner.messages import LearnerSpec, PreparedRun, StageResult
from learner.settings.stages import StageSettings, with_explicit_starts

START_TIMEOUT_S = 120.0
"""For a process without a model; imports take long on a busy machine."""
PREPARE_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 60.0
END_TIMEOUT_S = 10.0
"""For the actor pool, in addition to the time that its actors have to finish."""
STATUS_TIMEOUT_S = 10.0
HEALTH_TIMEOUT_S = 120.0
"""Longest time without an answer, for processes that have no setting for it."""

POOL = "the actor pool"
POOL_NAME = "pool"
"""Name of the Ray actor in the namespace of the run."""

T = TypeVar("T")


def train(
    settings: RunSettings, folder: Path, console: Console, check_task: Callable[[Task], None] | None = None
) -> bool:
    """Run every stage that is not done yet. Ctrl-C ends the run after the current step, with a checkpoint.

    Returns whether the run is finished; if not, it was stopped on request and can be resumed. check_task: raises
    ValueError or ImportError if the evaluation after the run cannot use the task.

    Raises:
        UserError: the settings cannot be met (model, task, cluster), or a class of the user's own is refused.
        RunFailedError: a process failed; the message names it.
    """
    check_custom_parts(settings)
    check_checkpoints(settings, folder)
    view = RunView(folder.name, settings.stages, results=finished_stages(settings, folder))
    with lost_processes_reported(), LiveView(console, view) as live, RunLog(folder) as log:
        log.write("info", "driver", "run_started", "the run begins")
        view.note = "starting Ray"
        live.refresh()
        with run_cluster(settings, folder), RunCapacity(settings) as capacity:
            processes = RunProcesses(settings, folder, live, log, capacity)
            try:
                processes.run(check_task)
            finally:
                processes.stop()
            results = [view.results.get(stage.name) for stage in settings.stages]
            finished = all(result is not None and result.finished for result in results)
            if finished:
                log.write("info", "driver", "run_finished", "the run is finished")
            else:
                log.write("info", "driver", "run_stopped", "the run was stopped")
            return finished


class RunProcesses:
    """The processes of one run: the learner, and a buffer and actors where a stage needs them."""

    def __init__(self, settings: RunSettings, folder: Path, live: LiveView, log: RunLog, capacity: RunCapacity) -> None:
        self._settings = settings
        self._folder = folder
        self._live = live
        self._view = live.view
        self._log = log
        self._capacity = capacity
        self._learner: LearnerGroup | None = None
        self._pool: ActorHandle | None = None
        self._buffer: BufferClient | None = None
        self._shard_watch: ShardWatch | None = None
        self._questions: HeldOutQuestions | None = None
        self._metrics = MetricExporter(folder.name)
        autoscale = settings.actors.autoscale
        self._autoscaler = None if autoscale is None else Autoscaler(autoscale)
        self._silent_since: dict[str, float] = {}
        self._stopping_since: float | None = None

    def run(self, check_task: Callable[[Task], None] | None) -> None:
        """Start the processes and run the stages; the results are in the view."""
        stages = with_explicit_starts(self._settings.stages)
        remaining = [stage for stage in stages if stage.name not in self._view.results]
        learner = self._start_learner()
        try:
            self._note("loading model and task")
            run = self._prepare(learner, check_task)
            newest_version = newest_published(self._settings, self._folder, run.contract)
            check_examples(run.task, self._folder)
            if any(needs_actors(stage, self._settings.noise) for stage in remaining):
                self._start_actors(learner, run, newest_version)
            else:
                self._capacity.release_actors()
            self._note("")
            for stage in remaining:
                result = self._view.results[stage.name] = self._run_stage(learner, stage)
                if not result.finished or self._stopping_since is not None:
                    break
        except KeyboardInterrupt:  # between two stages: checkpoints hold everything
            pass

    def stop(self) -> None:
        """End every process of the run, actors first so that their last rollouts reach the buffer."""
        lines: list[str | None] = []
        if self._pool is not None:
            drain_s = self._settings.actors.drain_timeout_s
            stopping = RemoteCall[None](POOL, self._pool.stop.remote(drain_s), "stop")
            lines.append(end_actor(self._pool, stopping, drain_s + END_TIMEOUT_S))
        if self._buffer is not None:
            lines += self._buffer.close()
        for line in filter(None, lines):
            self._warn(line)
        if self._learner is not None:
            self._learner.stop()

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
            prioritized_replay=settings.buffer.sampler == "prioritized",
            features=tuple(settings.scoring.features),
            offers_backspace=settings.actors.rollout.backspace,
            held_out=settings.evaluation.held_out,
        )
        self._learner = LearnerGroup(spec, self._capacity.learner)
        return self._learner

    def _wait_for_capacity(self, missing: str) -> None:
        note = f"waiting for free capacity: {missing}"
        if self._view.note != note:
            self._log.write("info", "driver", "capacity_awaited", note, {"missing": missing})
        self._note(note)

    def _prepare(self, learner: LearnerGroup, check_task: Callable[[Task], None] | None) -> PreparedRun:
        if self._settings.learner.num_ranks > 1:
            learner.join().wait(START_TIMEOUT_S, self._live.refresh)
        try:
            run = learner.call("prepare", task="load its model").wait(PREPARE_TIMEOUT_S, self._live.refresh)
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
        buffer = self._buffer = start_buffer(folder, run.contract, settings.buffer, settings.seed)
        self._shard_watch = ShardWatch(buffer.shards, settings.buffer.health_timeout_s)
        spec = RolloutSpec(
            config_json=run.config_json,
            contract=run.contract,
            task=run.task.name,
            settings=settings.actors,
            noise=settings.noise,
            max_length=engine_length(settings, run),
            scoring=settings.scoring if settings.scoring.scorers else None,
            tokenizer=run.task.tokenizer,
            questions=questions_of(settings, run.task),
        )
        # On the driver's node: if the pool were on a node of actors, the loss of that node would end the run.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        environment = engine_environment(settings.actors.num_threads)
        self._pool = (
            ray.remote(ActorPool)
            .options(name=POOL_NAME, num_cpus=0, scheduling_strategy=here)
            .remote(spec, [ray.put(run.task.example_table())], buffer.shards, environment, settings.actors.count)
        )
        self._questions = HeldOutQuestions(settings, run.task, run.contract)
        self._call_pool(self._pool.pause.remote(), "pause")  # until the learner has published the first weights
        self._call_pool(self._pool.start.remote(self._capacity.release_actors()), "start")
        first_version = max(buffer.newest_version(START_TIMEOUT_S, self._live.refresh), newest_version) + 1
        call = learner.call("connect", buffer.shards, self._pool, first_version, task="publish its first weights")
        call.wait(PREPARE_TIMEOUT_S, self._live.refresh)

    def _call_pool(self, reference: ray.ObjectRef[None], task: str) -> None:
        RemoteCall[None](POOL, reference, task).result(START_TIMEOUT_S, self._live.refresh)

    def _run_stage(self, learner: LearnerGroup, stage: StageSettings) -> StageResult:
        if self._pool is not None:  # until the learner has published the weights that the stage starts from
            self._call_pool(self._pool.pause.remote(), "pause")
        call = learner.call("run_stage", stage, introduces_backspace(self._settings, stage))
        while True:
            try:
                result = call.wait(math.inf, self._refresh)
                assert isinstance(result, StageResult)
                return result
            except LearnerFailedError as error:
                losses = "" if self._view.pool is None else self._view.pool.losses()
                if isinstance(error.cause, TimeoutError) and losses:
                    raise RunFailedError(f"{error}; {losses}") from error
                raise
            except KeyboardInterrupt:
                if self._stopping_since is not None:
                    raise RunFailedError("stopped by a second Ctrl-C, without a last checkpoint") from None
                self._stopping_since = time.monotonic()
                self._live.say("stopping after this step, with a checkpoint (Ctrl-C again to stop at once)")
                learner.request_stop()

    def _refresh(self) -> None:
        """Poll all processes. One that is too busy to answer keeps its last status until its timeout."""
        view = self._view
        assert self._learner is not None
        health_timeout_s = self._settings.learner.health_timeout_s
        view.learner = self._ask(learner_status(self._learner.leader), view.learner, health_timeout_s)
        if self._pool is not None and self._buffer is not None and self._shard_watch is not None:
            view.pool = self._ask(pool_status(self._pool), view.pool)
            view.buffer = self._buffer.status(SHARD_TIMEOUT_S)
            for line in self._shard_watch.look(view.buffer):
                self._warn(line)
            if self._questions is not None:
                self._questions.follow(view.learner, self._learner.leader, self._pool, self._log)
            if self._stopping_since is None:
                self._autoscale(self._pool)
        self._metrics.export(view)
        self._log.follow(view)
        if view.pool is not None and view.pool.failure is not None:
            error = UserError if view.pool.refused else RunFailedError
            raise error(f"{POOL} gave up: {view.pool.failure}")
        self._live.refresh()
        if self._stopping_since is not None and time.monotonic() - self._stopping_since > STOP_TIMEOUT_S:
            raise RunFailedError(f"the learner did not stop within {STOP_TIMEOUT_S:.0f} s")

    def _autoscale(self, pool: ActorHandle) -> None:
        """Adapt the number of actors to the limiter's waits, as `sequencematch scale` would."""
        view = self._view
        if self._autoscaler is None or view.pool is None or view.buffer is None:
            return
        seen = Observation.of(time.monotonic(), view.pool, sample_waits=view.buffer.waiting_samples > 0)
        wanted = self._autoscaler.observe(seen)
        if wanted is not None:
            message = f"autoscaling asks for {wanted} actors instead of {seen.desired}"
            self._log.write("info", "driver", "autoscaled", message, {"wanted": wanted, "before": seen.desired})
            view.pool = self._ask(RemoteCall[PoolStatus](POOL, pool.scale.remote(wanted)), view.pool)

    def _ask(self, call: RemoteCall[T], last: T | None, health_timeout_s: float = HEALTH_TIMEOUT_S) -> T | None:
        """The answer, or `last` if none comes in time. RunFailedError: no answer for `health_timeout_s`."""
        asked_at = time.monotonic()
        try:
            answer = call.result(min(STATUS_TIMEOUT_S, health_timeout_s))
        except NoAnswerError:
            silent_since = self._silent_since.setdefault(call.who, asked_at)
            if time.monotonic() - silent_since >= health_timeout_s:
                raise RunFailedError(
                    f"{call.who} has been silent for {health_timeout_s:.0f} s: its process hangs, or its node is out "
                    "of reach"
                ) from None
            return last
        self._silent_since.pop(call.who, None)
        return answer

    def _note(self, note: str) -> None:
        """Show what the run does while it does not train."""
        self._view.note = note
        self._live.refresh()

    def _warn(self, warning: str) -> None:
        self._log.write("warning", "driver", "process_warning", warning)
        self._live.say(warning, "yellow")


def pool_status(pool: ActorHandle) -> RemoteCall[PoolStatus]:
    """Request the status of the actor pool."""
    return RemoteCall(POOL, pool.status.remote())
