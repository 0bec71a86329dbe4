"""The learner's processes as the driver sees them: one call goes to all ranks, and one error comes back.

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
"""Of rank 0, in the namespace of the run; the others have their number behind it."""

ANSWER_TIMEOUT_S = 60.0
CAUSE_TIMEOUT_S = 15.0
"""After a rank has lost the others: longest wait for the one that knows why."""


class LearnerFailedError(RunFailedError):
    """A rank died or raised an error. cause: the error that it raised; None if its process died."""

    def __init__(self, message: str, cause: BaseException | None = None) -> None:
        super().__init__(message)
        self.cause = cause


class LearnerCall:
    """A call that all ranks are working on."""

    def __init__(self, calls: Sequence[RemoteCall[object]]) -> None:
        """calls: one to each rank."""
        self._calls = list(calls)
        self._failed_at: float | None = None

    def wait(self, timeout_s: float, while_waiting: Callable[[], None]) -> object:
        """What rank 0 gives, once all ranks are done. May be called again after an error of `while_waiting`.

        while_waiting: called every `POLL_S`, and once more at the end.

        Raises:
            LearnerFailedError: a rank failed, whatever the others do; of several, one that knows why.
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
        """Raise the error of the rank that failed first in truth; return where there is none, or none is known yet."""
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
        remedy = "; make room there, then resume the run" if is_disk_full(error.cause) else ""
        message = f"{call.who} failed: {type(error.cause).__name__}: {error.cause}{remedy}"
        failure = LearnerFailedError(message, error.cause)
        failure.__cause__ = error  # its traceback
        return failure
    except (ProcessLostError, NoAnswerError) as error:
        return LearnerFailedError(str(error))
    return None


class LearnerGroup:
    """One actor for each rank of the learner; they start at once and are ready when the first call is."""

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
        """Let the ranks find each other; comes before everything else, where they are several."""
        rendezvous = self.leader.open_rendezvous.options(concurrency_group="training").remote()
        return self.call("join", rendezvous, task="find the other ranks")

    def call(self, method: str, *arguments: object, task: str = "answer") -> LearnerCall:
        """Call a method of `LearnerWorker` on every rank. task: see `RemoteCall`."""
        references = [
            getattr(actor, method).options(concurrency_group="training").remote(*arguments) for actor in self._actors
        ]
        return LearnerCall([RemoteCall(*each, task) for each in zip(self._names, references, strict=True)])

    def stop(self) -> None:
        """End the processes, whatever they do."""
        for actor in self._actors:
            ray.kill(actor)


def learner_status(leader: ActorHandle) -> RemoteCall[LearnerStatus]:
    """Ask rank 0 where training stands; it answers beside its work."""
    return RemoteCall("the learner", leader.status.options(concurrency_group="control").remote())
