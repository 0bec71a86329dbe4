"""The learner's processes, for the driver: each call goes to all ranks, and at most one error is raised.

These are plain Ray actors in one placement group, not a Ray Train worker group: docs/ranks.md says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from buffer.disk import is_disk_full
from buffer.processes import POLL_S, NoAnswerError, ProcessLostError, RemoteCall, ended_calls
from launch.errors import RunFailedError
from learner.messages import LearnerSpec, LearnerStatus
from learner.ranks import RankLostError
from learner.worker import LearnerWorker

LEARNER_NAME = "learner"
"""Ray name of rank 0 in the namespace of the run; other ranks append their number."""

ANSWER_TIMEOUT_S = 60.0
CAUSE_TIMEOUT_S = 15.0
"""After a rank has lost another one: longest wait for the error of the rank that failed first."""


class LearnerFailedError(RunFailedError):
    """A rank died or raised an error. cause: the error that it raised; None if its process died."""

    def __init__(self, message: str, cause: BaseException | None = None) -> None:
        super().__init__(message)
        self.cause = cause


class LearnerCall:
    """A call to all ranks that is not done yet."""

    def __init__(self, calls: Sequence[RemoteCall[object]]) -> None:
        """calls: one to each rank."""
        self._calls = list(calls)
        self._failed_at: float | None = None

    def wait(self, timeout_s: float, while_waiting: Callable[[], None]) -> object:
        """The result of rank 0, once all ranks are done. May be called again after an error of `while_waiting`.

        while_waiting: called every `POLL_S`, and once more at the end.

        Raises:
            LearnerFailedError: a rank failed; if several did, the error of one that did not only lose another rank.
            NoAnswerError: they are not done within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            ended = ended_calls(self._calls, POLL_S)
            pending = [call for call in self._calls if call not in ended]
            self._raise_failure(ended, someone_works=bool(pending))
            while_waiting()
            if not pending:
                return self._calls[0].result(ANSWER_TIMEOUT_S)
            if time.monotonic() > deadline:
                raise pending[0].silence(timeout_s)

    def _raise_failure(self, ended: Sequence[RemoteCall[object]], *, someone_works: bool) -> None:
        """Raise the error that caused the failure; return if no rank failed, or while the cause is not known yet."""
        errors = [error for call in ended if (error := _error_of(call)) is not None]
        for error in errors:
            if not isinstance(error.cause, RankLostError):
                raise error
        if errors:
            self._failed_at = self._failed_at or time.monotonic()
            if not someone_works or time.monotonic() - self._failed_at >= CAUSE_TIMEOUT_S:
                raise errors[0]


def _error_of(call: RemoteCall[object]) -> LearnerFailedError | None:
    try:
        call.result(ANSWER_TIMEOUT_S)
    except ray.exceptions.RayTaskError as error:
        remedy = "; free space there, then resume the run" if is_disk_full(error.cause) else ""
        message = f"{call.who} failed: {type(error.cause).__name__}: {error.cause}{remedy}"
        failure = LearnerFailedError(message, error.cause)
        failure.__cause__ = error  # its traceback
        return failure
    except (ProcessLostError, NoAnswerError) as error:
        return LearnerFailedError(str(error))
    return None


class LearnerGroup:
    """One Ray actor for each rank of the learner; they are ready when the first call is done."""

    def __init__(self, spec: LearnerSpec, placement: PlacementGroup) -> None:
        """placement: has a bundle for each rank."""
        settings, size = spec.settings, spec.settings.num_ranks
        self._names = ["the learner"] if size == 1 else [f"learner rank {rank} of {size}" for rank in range(size)]
        self._actors: list[ActorHandle] = [
            ray.remote(concurrency_groups={"training": 1, "control": 2})(LearnerWorker)
            .options(
                name=LEARNER_NAME if rank == 0 else f"{LEARNER_NAME}-{rank}",
                num_cpus=settings.num_cpus,
                num_gpus=settings.num_gpus,
                resources=settings.resources,
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement, rank),
            )
            .remote(spec, rank)
            for rank in range(size)
        ]

    @property
    def leader(self) -> ActorHandle:
        """Rank 0."""
        return self._actors[0]

    def request_stop(self) -> None:
        """End the running stage after its current step, with a checkpoint."""
        self.leader.request_stop.options(concurrency_group="control").remote()

    def join(self) -> LearnerCall:
        """Connect the ranks; with several ranks, before every other call."""
        rendezvous = self.leader.open_rendezvous.options(concurrency_group="training").remote()
        return self.call("join", rendezvous, task="find the other ranks")

    def call(self, method: str, *arguments: object, task: str = "answer") -> LearnerCall:
        """Call a method of `LearnerWorker` on every rank. task: see `RemoteCall`."""
        references = [
            getattr(actor, method).options(concurrency_group="training").remote(*arguments) for actor in self._actors
        ]
        return LearnerCall([RemoteCall(*each, task) for each in zip(self._names, references, strict=True)])

    def stop(self) -> None:
        """Kill the processes."""
        for actor in self._actors:
            ray.kill(actor)


def learner_status(leader: ActorHandle) -> RemoteCall[LearnerStatus]:
    """Request the status of rank 0, which answers while it trains."""
    return RemoteCall("the learner", leader.status.options(concurrency_group="control").remote())
