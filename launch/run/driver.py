"""The driver of a run: creates buffer, learner and actor pool on Ray, runs the stages, and ends all it started."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow.compute as pc
import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.markup import escape

from actors.engine.division import check_division
from actors.engine.settings import engine_environment
from actors.pool.autoscaler import Autoscaler, Observation
from actors.pool.pool import ActorPool
from actors.rollout_actor import RolloutSpec
from buffer.experts.tasks import Task
from launch.cluster.connection import run_cluster
from launch.cluster.placement import LEARNER, describe
from launch.cluster.room import ClusterRoom
from launch.command_errors import setting_up
from launch.errors import RunFailedError, UserError
from launch.monitoring.live_view import LiveView, RunView
from launch.monitoring.metric_export import MetricExporter
from launch.monitoring.run_log import RunLog
from launch.run.buffer_shards import BufferShards, check_buffer
from launch.run.cost_models import check_cost_models
from launch.run.learner_group import LearnerCall, LearnerFailedError, LearnerGroup
from launch.run_folder.checkpoints import check_checkpoints, finished_stages, newest_published
from launch.run_folder.examples import check_examples
from launch.run_folder.folder import BUFFER_FOLDER
from launch.run_folder.tokenizer import save_run_tokenizer
from launch.settings.run import RunSettings, introduces_backspace, needs_actors
from launch.settings.trusted_code import check_trusted
from learner.publication.publisher import PROBE_TOKENS
from learner.settings.stages import StageSettings, with_explicit_starts
from learner.spec import LearnerSpec, PreparedRun
from learner.status import StageResult

POLL_S = 0.25
STATUS_TIMEOUT_S = 10.0
HEALTH_TIMEOUT_S = 120.0  # of silence, where the settings say nothing else
BIRTH_TIMEOUT_S = 120.0  # of a process without a model; a busy machine takes long to import
PREPARE_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 60.0

Seen = TypeVar("Seen")

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
    with LiveView(console, view) as live, RunLog(folder) as log:
        log.write("info", "driver", "run_started", "the run begins")
        view.note = "starting Ray"
        live.refresh()
        with run_cluster(settings, folder), ClusterRoom(settings) as room:
            crew = _Crew(settings, folder, live, log, room)
            try:
                outcome = crew.run(check_task)
            finally:
                crew.stop()
            if outcome.finished:
                log.write("info", "driver", "run_finished", "the run is finished")
            else:
                log.write("info", "driver", "run_stopped", "the run was stopped")
            return outcome


class _Crew:
    """The processes of one run."""

    def __init__(self, settings: RunSettings, folder: Path, live: LiveView, log: RunLog, room: ClusterRoom) -> None:
        self._settings = settings
        self._room = room
        self._folder = folder
        self._live = live
        self._log = log
        self._metrics = MetricExporter(folder.name)
        self._buffer: BufferShards | None = None
        self._pool: ActorHandle | None = None
        self._stopping_since: float | None = None
        self._silent_since: dict[str, float] = {}
        self._notes_told = self._warnings_told = 0
        autoscale = settings.actors.autoscale
        self._autoscaler = None if autoscale is None else Autoscaler(autoscale)
        self._learner = self._create_learner()

    def run(self, check_task: Callable[[Task], None] | None) -> RunOutcome:
        stages = with_explicit_starts(self._settings.stages)
        remaining = [stage for stage in stages if stage.name not in self._live.view.results]
        try:
            self._note("loading model and task")
            run = self._prepare(check_task)
            newest_version = newest_published(self._settings, self._folder, run.contract)
            check_examples(run.task, self._folder)
            if any(needs_actors(stage, self._settings.noise) for stage in remaining):
                self._start_actors(run, newest_version)
            self._note("")
            for stage in remaining:
                result = self._run_stage(stage)
                self._live.view.results[stage.name] = result
                if not result.finished or self._stopping_since is not None:
                    break
        except KeyboardInterrupt:  # between two stages: nothing is under way that a checkpoint does not hold
            pass
        return self._outcome()

    def stop(self) -> None:
        """End every process of the run, actors first so that their last rollouts reach the buffer."""
        if self._pool is not None:
            self._end(self._pool, self._pool.stop.remote(self._settings.actors.drain_timeout_s))
        if self._buffer is not None:
            self._buffer.close(self._warn)
        self._learner.stop()

    def _outcome(self) -> RunOutcome:
        results = dict(self._live.view.results)
        done = [stage.name in results and results[stage.name].finished for stage in self._settings.stages]
        return RunOutcome(self._folder, results, finished=all(done))

    def _create_learner(self) -> LearnerGroup:
        settings = self._settings
        assignment = self._room.place(self._wait_for_room)
        self._log.write("info", "driver", "processes_placed", f"the plan: {describe(assignment)}")
        return LearnerGroup(
            LearnerSpec(
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
            ),
            [node.node_id for node in assignment[LEARNER]],
        )

    def _wait_for_room(self, missing: str) -> None:
        note = f"waiting for room: {missing}"
        if self._live.view.note != note:
            self._log.write("info", "driver", "room_awaited", note, missing=missing)
        self._note(note)

    def _prepare(self, check_task: Callable[[Task], None] | None) -> PreparedRun:
        if self._settings.learner.num_ranks > 1:
            self._wait_for_learner(self._learner.join(), BIRTH_TIMEOUT_S, "the ranks of the learner to find each other")
        try:
            run = self._wait_for_learner(self._learner.prepare(), PREPARE_TIMEOUT_S, "the learner to load its model")
        except LearnerFailedError as error:
            if isinstance(error.cause, ValueError | OSError | ImportError):
                raise UserError(str(error.cause)) from None
            raise
        assert isinstance(run, PreparedRun)
        rollout = self._settings.actors.rollout
        prompt: int = pc.max(pc.list_value_length(run.task.example_table()["prompt_ids"])).as_py()
        if prompt + rollout.max_new_tokens > run.max_length:
            raise UserError(
                f"a prompt of {prompt} tokens and actors.rollout.max_new_tokens={rollout.max_new_tokens} exceed "
                f"the model's context of {run.max_length} tokens: lower one of them or choose a longer context"
            )
        check_cost_models(self._settings.stages, run.contract.vocab_size)
        with setting_up():
            check_division(self._settings.actors.tensor_parallel_size, json.loads(run.config_json))
            if check_task is not None:
                check_task(run.task)
            save_run_tokenizer(run.task.tokenizer, self._folder)
        return run

    def _start_actors(self, run: PreparedRun, newest_version: int) -> None:
        settings = self._settings
        folder = self._folder / BUFFER_FOLDER
        check_buffer(folder, run.contract, settings.buffer)
        self._buffer = BufferShards(folder, run.contract, settings.buffer, settings.seed)
        spec = RolloutSpec(
            config_json=run.config_json,
            contract=run.contract,
            task=run.task.name,
            settings=settings.actors,
            noise=settings.noise,
            max_length=_engine_length(settings, run),
            seed=settings.seed,
            scoring=settings.scoring if settings.scoring.scorers else None,
            tokenizer=run.task.tokenizer,
        )
        # Not on a node that only holds actors: it would be lost with that node, and the run with it.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._pool = (
            ray.remote(ActorPool)
            .options(name=POOL_NAME, num_cpus=0, scheduling_strategy=here)
            .remote(
                spec,
                [ray.put(run.task.example_table())],
                self._buffer.shards,
                engine_environment(spec.engine_settings("", seed=0)),
                settings.actors.count,
            )
        )
        self._wait(self._pool.start.remote(), BIRTH_TIMEOUT_S, "the actor pool to start")
        self._wait(self._pool.pause.remote(), BIRTH_TIMEOUT_S, "the actor pool to pause")
        first_version = max(self._buffer.newest_version(self._live.refresh), newest_version) + 1
        connected = self._learner.connect(self._buffer.shards, self._pool, first_version)
        self._wait_for_learner(connected, PREPARE_TIMEOUT_S, "the learner to publish its first weights")

    def _run_stage(self, stage: StageSettings) -> StageResult:
        if self._pool is not None:  # until the learner has published the weights that the stage starts from
            self._wait(self._pool.pause.remote(), BIRTH_TIMEOUT_S, "the actor pool to pause")
        call = self._learner.run_stage(stage, introduces_backspace(self._settings, stage))
        while True:
            try:
                if call.finished(POLL_S):
                    assert isinstance(call.result, StageResult)
                    self._refresh()  # the last warnings
                    return call.result
                self._refresh()
                if self._stopping_since is not None and time.monotonic() - self._stopping_since > STOP_TIMEOUT_S:
                    raise RunFailedError(f"the learner did not stop within {STOP_TIMEOUT_S:.0f} s")
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
                self._learner.leader.request_stop.options(concurrency_group="control").remote()

    def _refresh(self) -> None:
        """Ask everyone how they are; who is too busy to answer is shown as last seen, for a while."""
        view = self._live.view
        status = self._learner.leader.status.options(concurrency_group="control").remote()
        view.learner = self._ask(status, view.learner, "the learner", self._settings.learner.health_timeout_s)
        if view.learner is not None:
            for note in view.learner.notes[self._notes_told :]:
                self._live.say(escape(note))  # the log takes both from the status
            for warning in view.learner.warnings[self._warnings_told :]:
                self._show(warning)
            self._notes_told, self._warnings_told = len(view.learner.notes), len(view.learner.warnings)
        if self._pool is not None and self._buffer is not None:
            view.pool = self._ask(self._pool.status.remote(), view.pool, "the actor pool")
            view.buffer = self._buffer.status(self._warn)
            self._autoscale(self._pool)
        if self._pool is None or (view.pool is not None and len(view.pool.members) >= view.pool.desired):
            self._room.withdraw()
        self._metrics.export(view)
        self._log.follow(view)
        if view.pool is not None and view.pool.failure is not None:
            error = UserError if view.pool.refused else RunFailedError
            raise error(f"the actor pool gave up: {view.pool.failure}")
        self._live.refresh()

    def _autoscale(self, pool: ActorHandle) -> None:
        """Follow the limiter's waits with the number of actors, as `sequencematch scale` would."""
        view = self._live.view
        if self._autoscaler is None or self._stopping_since is not None or view.pool is None or view.buffer is None:
            return
        seen = Observation.of(time.monotonic(), view.pool, draw_waits=view.buffer.waiting_draws > 0)
        wanted = self._autoscaler.observe(seen)
        if wanted is not None:
            message = f"autoscaling asks for {wanted} actors instead of {seen.desired}"
            self._log.write("info", "driver", "autoscaled", message, wanted=wanted, before=seen.desired)
            view.pool = self._ask(pool.scale.remote(wanted), view.pool, "the actor pool")

    def _ask(self, reference: ray.ObjectRef, last: Seen, whom: str, health_timeout_s: float = HEALTH_TIMEOUT_S) -> Seen:
        """The answer, or the last one where none comes in time: a process that hangs is told from a busy one by how
        long it has been silent.
        """
        asked_at = time.monotonic()
        try:
            answer: Seen = ray.get(reference, timeout=min(STATUS_TIMEOUT_S, health_timeout_s))
        except ray.exceptions.GetTimeoutError:
            silent_since = self._silent_since.setdefault(whom, asked_at)
            if time.monotonic() - silent_since >= health_timeout_s:
                raise RunFailedError(
                    f"{whom} has been silent for {health_timeout_s:.0f} s: its process hangs, or its node is out of "
                    "reach"
                ) from None
            return last
        except ray.exceptions.RayActorError as error:
            raise RunFailedError(f"{whom} died: {str(error).splitlines()[0]}") from None
        self._silent_since.pop(whom, None)
        return answer

    def _wait(self, reference: ray.ObjectRef, timeout_s: float, whom: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not ray.wait([reference], timeout=POLL_S)[0]:
            self._live.refresh()
            if time.monotonic() > deadline:
                raise RunFailedError(f"waited {timeout_s:.0f} s for {whom}")

    def _wait_for_learner(self, call: LearnerCall, timeout_s: float, what: str) -> object:
        """What rank 0 gives."""
        deadline = time.monotonic() + timeout_s
        while not call.finished(POLL_S):
            self._live.refresh()
            if time.monotonic() > deadline:
                raise RunFailedError(f"waited {timeout_s:.0f} s for {what}")
        return call.result

    def _note(self, note: str) -> None:
        self._live.view.note = note
        self._live.refresh()

    def _warn(self, warning: str) -> None:
        self._log.write("warning", "driver", "process_warning", warning)
        self._show(warning)

    def _show(self, warning: str) -> None:
        self._live.say(f"[yellow]{escape(warning)}[/yellow]")

    def _end(self, actor: ActorHandle, goodbye: ray.ObjectRef) -> None:
        try:
            ray.get(goodbye, timeout=self._settings.actors.drain_timeout_s + STATUS_TIMEOUT_S)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            self._warn(f"{actor} did not end by itself: {type(error).__name__}")
        ray.kill(actor)


def _engine_length(settings: RunSettings, run: PreparedRun) -> int:
    """Longest text that an engine will hold, in tokens: often far less than the model's context."""
    examples = run.task.example_table()
    prompts, targets = (pc.list_value_length(examples[name]) for name in ("prompt_ids", "target_ids"))
    answers = pc.max_element_wise(targets, settings.actors.rollout.max_new_tokens)
    longest: int = pc.max(pc.add(prompts, answers)).as_py()
    return min(run.max_length, max(longest, PROBE_TOKENS) + 1)
