"""The pool of rollout actors on Ray: their processes, their health, and the newest weights for each.

`actors.pool.controller` decides when actors start, drain and are replaced. The pool is an asyncio Ray actor, so its
methods return at once even if its actors are busy: the learner notifies it of weights without waiting, and
`sequencematch scale` works from any shell of the cluster.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.engine.rank_group import EngineRankError
from actors.pool.controller import ActorState, Failure, PoolController, PoolStatus
from actors.rollout_actor import ANSWER_TIMEOUT_S, ActorStatus, RolloutActor, RolloutSpec
from buffer.processes import NoAnswerError, ProcessLostError, RemoteCall, ignore_stop_signals
from buffer.service.client import Shard
from buffer.weights import WeightHandle, WeightManifest

STATUS_TIMEOUT_S = 5.0
SUPERVISION_INTERVAL_S = 0.5
TRACEBACK_CHARACTERS = 1500
ANSI_COLOR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass
class _Process:
    actor: ActorHandle
    ready: asyncio.Future[object]
    run: asyncio.Future[object] | None = None
    leaving: bool = False


class ActorPool:
    """Keeps `desired` rollout actors running with the newest weights; implements `ActorProcesses` for its controller.

    prompts: list with one reference to the Arrow table of training examples (kept in the object store).
    shards: of the replay buffer. environment: variables of the actor processes. desired: actors to start with.
    """

    def __init__(
        self,
        spec: RolloutSpec,
        prompts: list[ray.ObjectRef],
        shards: Sequence[Shard],
        environment: dict[str, str],
        desired: int,
    ) -> None:
        ignore_stop_signals()
        self._spec = spec
        self._prompts = prompts
        self._shards = shards
        self._environment = environment
        self._nodes: Sequence[str] = ()
        self._processes: dict[str, _Process] = {}
        self._newest: tuple[WeightManifest, WeightHandle] | None = None
        self._paused, self._first_version = False, 0
        self._controller = PoolController(desired, spec.settings, self)
        self._stopping = False
        self._supervisor: asyncio.Task[None] | None = None

    async def start(self, nodes: Sequence[str] = ()) -> None:
        """Begin supervision. nodes: planned node ids, by actor number; Ray chooses the nodes of further actors."""
        self._nodes = nodes
        if self._supervisor is None:
            self._supervisor = asyncio.create_task(self._supervise())

    async def scale(self, desired: int) -> PoolStatus:
        """Set the number of actors. New ones start with the newest weights; surplus ones drain and leave."""
        self._controller.scale(desired)
        return await self.status()

    async def notify(self, manifest: WeightManifest, handle: WeightHandle) -> None:
        """Notify every running actor of new weights, and later actors of the newest; ValueError if they are older."""
        if manifest.version <= self._newest_version:
            raise ValueError(f"weights version {manifest.version} published after version {self._newest_version}")
        self._newest = (manifest, handle)
        for actor in self._staying():
            _control(actor.notify, manifest, handle)

    async def pause(self) -> None:
        """Start no new rollouts until `resume`, for a stage that needs none."""
        self._set_paused(True, self._first_version)

    async def resume(self, first_version: int) -> None:
        """Start rollouts again, with weights of `first_version` (the first ones of the stage) or newer."""
        self._set_paused(False, first_version)

    async def answer(self, version: int) -> pa.RecordBatch:
        """Let an actor answer the held-out questions (see `RolloutActor.answer`); if it fails, ask the next one.
        NoAnswerError: none answered; the message says why."""
        reasons = []
        for name, process in list(self._processes.items()):
            if process.run is None or process.leaving:
                continue
            answers = process.actor.answer.options(concurrency_group="evaluation").remote(version)
            try:
                return await RemoteCall(name, answers, "answer the held-out questions").answer(ANSWER_TIMEOUT_S)
            except (NoAnswerError, ProcessLostError) as error:
                reasons.append(str(error).strip().splitlines()[-1])
        why = "; ".join(reasons) or "no actor is running"
        raise NoAnswerError(f"no actor answered the held-out questions with weights version {version}: {why}")

    async def status(self) -> PoolStatus:
        """Counts and the last known status of every actor."""
        if self._supervisor is not None and self._supervisor.done() and not self._stopping:
            self._supervisor.result()  # an error in supervision must not look like a healthy pool
        return self._controller.status(self._newest_version)

    async def stop(self, timeout_s: float) -> None:
        """Drain every actor for at most `timeout_s` seconds, then kill the remaining ones."""
        self._stopping = True
        controller = self._controller
        controller.close()
        deadline = time.monotonic() + timeout_s
        while controller.names and time.monotonic() < deadline:
            controller.reconcile(time.monotonic())
            await asyncio.sleep(0.05)
        for name in controller.names:
            controller.end(name, "actor_ended", f"{name} ended by force: it did not drain within {timeout_s:.0f} s")
        if self._supervisor is not None:
            self._supervisor.cancel()

    def actor_state(self, name: str) -> ActorState:
        process = self._processes[name]
        call = process.ready if process.run is None else process.run
        if not call.done():
            return "starting" if process.run is None else "running"
        error = call.exception()
        if error is not None:
            return failure_of(error, starting=process.run is None)
        return "ready" if process.run is None else "left"

    def create_actor(self, name: str, number: int) -> None:
        needs = self._spec.settings.needs()
        planned = self._nodes[number] if number < len(self._nodes) else ""
        unplanned = "SPREAD" if self._spec.settings.placement == "spread" else "DEFAULT"
        actor = (
            ray.remote(concurrency_groups={"generation": 1, "control": 4, "evaluation": 1})(RolloutActor)
            .options(
                scheduling_strategy=at_best_on(planned) if planned else unplanned,
                num_cpus=needs.pop("CPU"),
                num_gpus=needs.pop("GPU"),
                resources=needs,
                runtime_env={"env_vars": self._environment},
                max_restarts=0,  # the pool replaces actors itself, with the newest weights
            )
            .remote(name, self._spec, self._prompts[0], self._shards, number)
        )
        self._processes[name] = _Process(actor, asyncio.ensure_future(_control(actor.ready)))

    def start_actor(self, name: str) -> None:
        process = self._processes[name]
        if self._newest is not None:
            _control(process.actor.notify, *self._newest)
        _control(process.actor.set_paused, self._paused, self._first_version)
        process.run = asyncio.ensure_future(process.actor.run.options(concurrency_group="generation").remote())

    def drain_actor(self, name: str) -> None:
        process = self._processes[name]
        process.leaving = True
        _control(process.actor.drain)

    def remove_actor(self, name: str) -> None:
        ray.kill(self._processes.pop(name).actor)

    async def _supervise(self) -> None:
        while not self._stopping:
            running = {name: process.actor for name, process in self._processes.items() if process.run is not None}
            calls = [RemoteCall[ActorStatus](name, _control(actor.status)) for name, actor in running.items()]
            answers = await asyncio.gather(*(call.answer(STATUS_TIMEOUT_S) for call in calls), return_exceptions=True)
            for name, answer in zip(running, answers, strict=True):
                if isinstance(answer, ActorStatus):  # `reconcile` detects the others by their silence or death
                    self._controller.heard_from(name, answer, time.monotonic())
            self._controller.reconcile(time.monotonic())
            await asyncio.sleep(SUPERVISION_INTERVAL_S)

    @property
    def _newest_version(self) -> int:
        return -1 if self._newest is None else self._newest[0].version

    def _set_paused(self, paused: bool, first_version: int) -> None:
        self._paused, self._first_version = paused, first_version
        for actor in self._staying():
            _control(actor.set_paused, paused, first_version)

    def _staying(self) -> Iterator[ActorHandle]:
        return (each.actor for each in self._processes.values() if each.run is not None and not each.leaving)


def at_best_on(node_id: str) -> object:
    """Ray's scheduling strategy for a process: on that node while it lives and has capacity, else on another one."""
    return NodeAffinitySchedulingStrategy(node_id, soft=True, _spill_on_unavailable=True)


def _control(method: ray.actor.ActorMethod, *arguments: object) -> ray.ObjectRef:
    """Call a method in the control group, since the generation loop occupies its own group."""
    return method.options(concurrency_group="control").remote(*arguments)


def failure_of(error: BaseException, starting: bool) -> Failure:
    """The failure for the error of a call. An actor whose constructor raised would raise again."""
    text = ANSI_COLOR.sub("", str(error)).strip()
    if isinstance(error, ray.exceptions.RayActorError) and error.actor_init_failed:
        reason = text.splitlines()[-1]  # the rest is the traceback of the constructor
        # A rank that dies early is like an actor that dies early: the next attempt may succeed.
        in_vain = starting and EngineRankError.__name__ not in reason
        # A ValueError of our own needs no traceback.
        return Failure(reason, in_vain, "" if reason.startswith(ValueError.__name__) else _end_of(text))
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    return Failure(f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0]}", traceback=_end_of(text))


def _end_of(text: str) -> str:
    """The last lines; the error of a compiler is near the end."""
    if len(text) <= TRACEBACK_CHARACTERS:
        return text
    end = text[-TRACEBACK_CHARACTERS:]
    return end.partition("\n")[2] or end
