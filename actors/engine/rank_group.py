"""The ranks of one actor's engine, where a model is divided over several processes (`actors.tensor_parallel_size`).

The actor is rank 0. It makes the others as Ray actors of its own, so that they end with it, on its node, with the
resources that Ray has set aside for it. They repeat each call of its engine; Ray keeps the order. None is waited for:
they keep step by exchanging tensors. What they answer, a digest of all that they drew, is compared with the actor's own
behind its back, and before rollouts leave it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.engine.interface import EngineSettings
from actors.engine.weights import WeightIntake
from buffer.remote_call import NoAnswerError, ProcessLostError, RemoteCall
from buffer.stop_signals import ignore_stop_signals
from buffer.trajectory.schema import TokenContract
from buffer.weights import WeightHandle, WeightManifest, WeightMismatchError

if TYPE_CHECKING:
    from actors.engine.rank_executor import RankPlace
    from actors.engine.ranked_engine import EngineCall, LeadingEngine, RankedEngine

VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"

NUM_UNANSWERED = 8
"""Calls that other ranks may be behind. A step cannot end without all ranks, so they are one or two in practice."""

BLAME_TIMEOUT_S = 5.0
"""Ray tells of a dead process later than its broken connections do."""


class EngineRankError(RuntimeError):
    """A rank died, failed, fell silent, or draws other tokens than the rest: the actor is of no more use."""


class EngineRank:
    """A Ray actor that holds one of the other ranks."""

    def __init__(self, visible_gpus: str | None) -> None:
        """Load vLLM. visible_gpus: CUDA's, of rank 0; Ray shows none to an actor that asks for none."""
        ignore_stop_signals()
        if visible_gpus is not None:
            os.environ[VISIBLE_GPUS] = visible_gpus
        import actors.engine.ranked_engine  # noqa: F401  # takes seconds, for which nobody is to wait in the group

        self._engine: RankedEngine
        self._intake: WeightIntake

    def ready(self) -> None:
        """Returns once vLLM is loaded."""

    def build(self, settings: EngineSettings, contract: TokenContract, place: RankPlace) -> int:
        """Build the engine together with the other ranks; gives its digest, as all calls do."""
        from actors.engine.ranked_engine import RankedEngine

        self._engine = RankedEngine(settings, contract, place)
        self._intake = WeightIntake(self._engine)
        return self._engine.digest

    def repeat(self, calls: Sequence[EngineCall]) -> int:
        """See `RankedEngine.repeat`."""
        self._engine.repeat(calls)
        return self._engine.digest

    def take_weights(self, manifest: WeightManifest, handle: WeightHandle) -> int:
        """See `actors.engine.weights`."""
        self._intake.take(manifest, handle)
        return self._engine.digest


@dataclass(frozen=True)
class _Broadcast:
    """One call to all other ranks. digest: of rank 0 when it had made the call itself."""

    calls: list[RemoteCall[int]]
    digest: int

    def answered(self) -> bool:
        return all(call.done() for call in self.calls)


class RankGroup:
    """Rank 0's engine, and the other ranks as Ray actors."""

    def __init__(
        self,
        name: str,
        settings: EngineSettings,
        contract: TokenContract,
        size: int,
        start_timeout_s: float,
        step_timeout_s: float,
    ) -> None:
        """Start the other ranks and build the engine of all.

        Args:
            name: of the actor.
            settings: of each rank; the folder of the model may be gone once this returns.
            start_timeout_s: longest wait for the processes to start. step_timeout_s: for any of them from then on.

        Raises:
            ValueError: the engine cannot be built.
            EngineRankError: a rank did not come, or failed.
        """
        self._name = name
        self._timeout_s = step_timeout_s
        self._pending: deque[_Broadcast] = deque()
        node_id = ray.get_runtime_context().get_node_id()
        process = ray.remote(EngineRank).options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        )
        self._others: list[ActorHandle] = [process.remote(os.environ.get(VISIBLE_GPUS)) for _ in range(1, size)]
        ready = [rank.ready.remote() for rank in self._others]
        # Here, not at the top: whoever only names these classes should not load vLLM for it.
        from actors.engine.rank_executor import RankPlace
        from actors.engine.ranked_engine import LeadingEngine

        _results(self._calls(ready), start_timeout_s)
        rendezvous_file = str(Path(settings.model_dir, "rendezvous"))
        places = [RankPlace(rank, size, rendezvous_file, step_timeout_s) for rank in range(size)]
        building = [
            rank.build.remote(settings, contract, place) for rank, place in zip(self._others, places[1:], strict=True)
        ]
        with self._together(building):
            self.engine: LeadingEngine = LeadingEngine(settings, contract, places[0], self._broadcast)
        self.settle()

    def take_weights(self, intake: WeightIntake, manifest: WeightManifest, handle: WeightHandle) -> None:
        """Load a publication into the engines of all ranks; each takes it itself. intake: of the engine of this one."""
        self.engine.flush()
        taking = [rank.take_weights.remote(manifest, handle) for rank in self._others]
        with self._together(taking):
            intake.take(manifest, handle)

    def settle(self) -> None:
        """Wait until all ranks have made the calls of rank 0, and have drawn the same tokens.

        Raises:
            EngineRankError: they have not.
        """
        while self._pending:
            self._check_oldest()

    def _broadcast(self, calls: Sequence[EngineCall]) -> AbstractContextManager[None]:
        return self._together([rank.repeat.remote(calls) for rank in self._others])

    @contextmanager
    def _together(self, answers: list[ray.ObjectRef]) -> Iterator[None]:
        """While rank 0 makes the call that the others will have answered by `answers`."""
        # Those of the last step are hardly here yet, and asking costs as much as the answer.
        while len(self._pending) > 1 and (len(self._pending) > NUM_UNANSWERED or self._pending[0].answered()):
            self._check_oldest()
        calls = self._calls(answers)
        try:
            yield
        except WeightMismatchError:
            raise  # all ranks have found the same
        except RuntimeError as error:
            # Who is lost has failed first, and the others for want of it.
            ray.wait(answers, num_returns=len(answers), timeout=BLAME_TIMEOUT_S)
            together = f"{len(answers) + 1} ranks of {self._name} failed together"
            _, reason = min(filter(None, (_failure(call, 0.0) for call in calls)), default=(0, together))
            raise EngineRankError(f"{reason}: {_first_line(error)}") from error
        self._pending.append(_Broadcast(calls, self.engine.digest))

    def _check_oldest(self) -> None:
        oldest = self._pending.popleft()
        for call, digest in zip(oldest.calls, _results(oldest.calls, self._timeout_s), strict=True):
            if digest != oldest.digest:
                raise EngineRankError(
                    f"{call.who} has drawn other tokens than rank 0; the rollouts since the last hand-over are "
                    "dropped. If it happens again, set actors.tensor_parallel_size=1"
                )

    def _calls(self, answers: Sequence[ray.ObjectRef]) -> list[RemoteCall[int]]:
        """answers: of the other ranks, in order."""
        return [RemoteCall(f"rank {rank} of {self._name}", answer) for rank, answer in enumerate(answers, start=1)]


def _results(calls: Sequence[RemoteCall[int]], timeout_s: float) -> list[int]:
    for call in calls:
        failure = _failure(call, timeout_s)
        if failure is not None:
            raise EngineRankError(failure[1])
    return [call.result(timeout_s) for call in calls]


def _failure(call: RemoteCall[int], timeout_s: float) -> tuple[int, str] | None:
    """What went wrong with a rank, by how far it is from being the consequence of something else."""
    try:
        call.result(timeout_s)
    except ray.exceptions.RayTaskError as error:
        return 2, f"{call.who} failed: {type(error.cause).__name__}: {_first_line(error.cause)}"
    except NoAnswerError:
        return 1, f"{call.who} is silent" + (f" for {timeout_s:g} s" if timeout_s else "")
    except ProcessLostError:
        return 0, f"{call.who} died"
    return None


def _first_line(error: BaseException) -> str:
    """Its message without the stack of C++ calls that torch appends."""
    return str(error).partition("\n")[0]
