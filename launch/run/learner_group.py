"""The learner's processes as the driver sees them: one call goes to all ranks, and one error comes back.

These are plain Ray actors in one placement group, not a Ray Train worker group (tried with Ray 2.60): Ray Train owns
the main function of its workers, so that they would have to fetch stages and stops instead of being called; its
clean-up asks the dashboard, which a Ray that is started for one run does not have; and with its controller and three
helpers the start of a single worker took 21 s, where such an actor took 3 s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from buffer.disk import is_disk_full
from buffer.remote_call import POLL_S, NoAnswerError, ProcessLostError, RemoteCall, ended_calls
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
        self._pending = dict(enumerate(calls))
        self._result: object = None
        self._errors: dict[int, LearnerFailedError] = {}
        self._failed_at = 0.0

    def wait(self, timeout_s: float, while_waiting: Callable[[], None]) -> object:
        """What rank 0 gives, once all ranks are done. May be called again after an error of `while_waiting`.

        while_waiting: called every `POLL_S`, and once more at the end.

        Raises:
            LearnerFailedError: a rank failed, whatever the others do; of several, one that knows why.
            NoAnswerError: they are not done within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while self._pending:
            ended = ended_calls(list(self._pending.values()), POLL_S)
            for rank in [rank for rank, call in self._pending.items() if call in ended]:
                self._finish(rank, self._pending[rank])
            self._raise_cause()
            while_waiting()
            if self._pending and time.monotonic() > deadline:
                raise next(iter(self._pending.values())).silence(timeout_s)
        return self._result

    def _finish(self, rank: int, call: RemoteCall[object]) -> None:
        try:
            value = call.result(ANSWER_TIMEOUT_S)
            self._result = value if rank == 0 else self._result
        except ray.exceptions.RayTaskError as error:
            remedy = "; make room there, then resume the run" if is_disk_full(error.cause) else ""
            message = f"{call.who} failed: {type(error.cause).__name__}: {error.cause}{remedy}"
            self._errors[rank] = LearnerFailedError(message, error.cause)
            self._errors[rank].__cause__ = error  # its traceback
        except (ProcessLostError, NoAnswerError) as error:
            self._errors[rank] = LearnerFailedError(str(error))
        del self._pending[rank]  # last: Ctrl-C may interrupt this, and the wait goes on
        if self._errors:
            self._failed_at = self._failed_at or time.monotonic()

    def _raise_cause(self) -> None:
        """Raise the error of the rank that failed first in truth; return where there is none, or none is known yet."""
        causes = [rank for rank, error in self._errors.items() if not isinstance(error.cause, RankLostError)]
        if causes:
            raise self._errors[min(causes)]
        if self._errors and not (self._pending and time.monotonic() - self._failed_at < CAUSE_TIMEOUT_S):
            raise self._errors[min(self._errors)]


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
        meeting = self.leader.open_meeting.options(concurrency_group="training").remote()
        return self.call("join", meeting, task="find the other ranks")

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
