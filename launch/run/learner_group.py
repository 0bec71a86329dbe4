"""The learner's processes as the driver sees them: one call goes to all ranks, and one error comes back.

These are plain Ray actors in one placement group, not a Ray Train worker group (tried with Ray 2.60): Ray Train owns
the main function of its workers, so that they would have to fetch stages and stops instead of being called; its
clean-up asks the dashboard, which a Ray that is started for one run does not have; and with its controller and three
helpers the start of a single worker took 21 s, where such an actor took 3 s.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from buffer.full_disk import is_disk_full
from buffer.service.shard import Shard
from launch.errors import RunFailedError
from learner.ranks.group import RankLostError
from learner.settings.stages import StageSettings
from learner.spec import LearnerSpec
from learner.worker import LearnerWorker

LEARNER_NAME = "learner"
"""Of rank 0, in the namespace of the run; the others have their number behind it."""

NODE_LABEL = "ray.io/node-id"
"""Ray gives it to every node."""

ANSWER_TIMEOUT_S = 60.0
CAUSE_TIMEOUT_S = 15.0
"""After a rank has lost the others: longest wait for the one that knows why."""


class LearnerFailedError(RunFailedError):
    """A rank died or raised an error. cause: the error that it raised; None if its process died."""

    def __init__(self, who: str, error: ray.exceptions.RayError) -> None:
        self.cause: BaseException | None = error.cause if isinstance(error, ray.exceptions.RayTaskError) else None
        if self.cause is None:
            super().__init__(f"{who} died: {str(error).splitlines()[0]}")
        else:
            remedy = "; make room there, then resume the run" if is_disk_full(self.cause) else ""
            super().__init__(f"{who} failed: {type(self.cause).__name__}: {self.cause}{remedy}")


class LearnerCall:
    """A call that all ranks are working on."""

    def __init__(self, references: list[ray.ObjectRef], names: list[str]) -> None:
        """references, names: of each rank."""
        self._pending = dict(enumerate(references))
        self._names = names
        self._errors: dict[int, ray.exceptions.RayError] = {}
        self._failed_at = 0.0
        self.result: object = None
        """What rank 0 gave, once all have finished."""

    def finished(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` seconds; gives whether all ranks are done.

        Raises:
            LearnerFailedError: a rank failed, whatever the others do; of several, one that knows why.
        """
        references = list(self._pending.values())
        done, _ = ray.wait(references, num_returns=len(references), timeout=timeout_s)
        for rank in [rank for rank, reference in self._pending.items() if reference in done]:
            self._take(rank)
        if self._errors:
            self._raise_cause()
        return not self._pending

    def _take(self, rank: int) -> None:
        try:
            value = ray.get(self._pending.pop(rank), timeout=ANSWER_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            self._failed_at = self._failed_at or time.monotonic()
            self._errors[rank] = error
        else:
            if rank == 0:
                self.result = value

    def _raise_cause(self) -> None:
        """Raise the error of the rank that failed first in truth; return where it is not known yet."""
        causes = [rank for rank, error in self._errors.items() if not _is_consequence(error)]
        if not causes and self._pending and time.monotonic() - self._failed_at < CAUSE_TIMEOUT_S:
            return
        rank = min(causes or self._errors)
        raise LearnerFailedError(self._names[rank], self._errors[rank]) from self._errors[rank]


def _is_consequence(error: ray.exceptions.RayError) -> bool:
    return isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, RankLostError)


class LearnerGroup:
    """One actor for each rank of the learner; they start at once and are ready when the first call is."""

    def __init__(self, spec: LearnerSpec, node_ids: Sequence[str]) -> None:
        """node_ids: of the node of each rank. All of them are set aside at once, or the first call waits for it."""
        settings = spec.settings
        self._size = settings.num_ranks
        resources = {"CPU": settings.num_cpus, "GPU": settings.num_gpus, **settings.resources}
        self._placement = placement_group(
            [resources] * self._size, bundle_label_selector=[{NODE_LABEL: node_id} for node_id in node_ids]
        )
        self._actors = [self._create(spec, rank) for rank in range(self._size)]
        self._names = [self._name_of(rank) for rank in range(self._size)]

    @property
    def leader(self) -> ActorHandle:
        """Rank 0, whose `status` is that of the learner, and which takes a request to stop."""
        return self._actors[0]

    def join(self) -> LearnerCall:
        """Let the ranks find each other; comes before everything else, where they are several."""
        return self._call("join", self.leader.open_meeting.options(concurrency_group="training").remote())

    def prepare(self) -> LearnerCall:
        """See `LearnerWorker.prepare`."""
        return self._call("prepare")

    def connect(self, shards: Sequence[Shard], pool: ActorHandle, first_version: int) -> LearnerCall:
        """See `LearnerWorker.connect`."""
        return self._call("connect", shards, pool, first_version)

    def run_stage(self, stage: StageSettings, introduces_backspace: bool) -> LearnerCall:
        """See `LearnerWorker.run_stage`."""
        return self._call("run_stage", stage, introduces_backspace)

    def stop(self) -> None:
        """End the processes, whatever they do."""
        for actor in self._actors:
            ray.kill(actor)
        remove_placement_group(self._placement)

    def _call(self, method: str, *arguments: object) -> LearnerCall:
        references = [
            getattr(actor, method).options(concurrency_group="training").remote(*arguments) for actor in self._actors
        ]
        return LearnerCall(references, self._names)

    def _create(self, spec: LearnerSpec, rank: int) -> ActorHandle:
        return (
            ray.remote(concurrency_groups={"training": 1, "control": 2})(LearnerWorker)
            .options(
                name=LEARNER_NAME if rank == 0 else f"{LEARNER_NAME}-{rank}",
                num_cpus=spec.settings.num_cpus,
                num_gpus=spec.settings.num_gpus,
                resources=spec.settings.resources,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, rank),
            )
            .remote(spec, rank)
        )

    def _name_of(self, rank: int) -> str:
        return "the learner" if self._size == 1 else f"learner rank {rank} of {self._size}"
