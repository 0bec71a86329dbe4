"""The engine of one actor, and the other processes of a large model's engine (`actors.tensor_parallel_size`).

The actor is rank 0. It creates the other ranks as Ray actors on its node; they use the resources that Ray reserved for
it, and end with it. They repeat each call of its engine, in the same order. Rank 0 does not wait for their answers: the
exchange of tensors synchronizes the ranks. Each answer is a digest of all sampled tokens. The actor compares it with
its own after later steps, and before it sends rollouts.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.engine.interface import EngineSettings
from actors.engine.weights import WeightLoader
from buffer.processes import NoAnswerError, ProcessLostError, RemoteCall, ignore_stop_signals
from buffer.trajectory.schema import TokenContract
from buffer.weights import WeightHandle, WeightManifest, WeightMismatchError

if TYPE_CHECKING:
    from actors.engine.engine import BackspaceEngine
    from actors.engine.ranked_engine import EngineCall, LeadingEngine, RankedEngine, RankPlace

VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"

NUM_UNANSWERED = 8
"""Unanswered calls of the other ranks, at most. A step needs all ranks, so there are one or two in practice."""

BLAME_TIMEOUT_S = 5.0
"""Longest wait for Ray to report a dead rank; its connections break earlier."""

Publication = tuple[WeightManifest, WeightHandle]


class EngineRankError(RuntimeError):
    """A rank died, failed, does not answer, or sampled other tokens than rank 0. The actor cannot be used any more."""


class EngineRank:
    """A Ray actor that holds one of the other ranks. Its calls give the digest of the engine."""

    def __init__(self, visible_gpus: str | None) -> None:
        """Load vLLM. visible_gpus: CUDA's, of rank 0; Ray shows none to an actor that asks for none."""
        ignore_stop_signals()
        if visible_gpus is not None:
            os.environ[VISIBLE_GPUS] = visible_gpus
        import actors.engine.ranked_engine  # noqa: F401  # takes seconds: load it before the ranks connect

    def ready(self) -> int:
        """Returns once vLLM is loaded."""
        return 0

    def build(self, settings: EngineSettings, contract: TokenContract, place: RankPlace) -> int:
        """Build the engine together with the other ranks."""
        from actors.engine.ranked_engine import RankedEngine

        self._engine: RankedEngine = RankedEngine(settings, contract, place)
        self._loader = WeightLoader(self._engine)
        return self._engine.digest

    def repeat(self, calls: Sequence[EngineCall], publication: Publication | None) -> int:
        """Make the calls that rank 0 made, then load the publication that it loads."""
        for call in calls:
            call(self._engine)
        if publication is not None:
            self._loader.load(*publication)
        return self._engine.digest


class RankGroup:
    """Rank 0's engine, its weight loader, and the other ranks, if there are any.

    settings: of each rank; the folder of the model is not needed after the creation. `actors` has the number of ranks;
        `start_timeout_s` bounds the wait for their start, `health_timeout_s` later waits.

    Raises (on creation):
        ValueError: the engine cannot be built.
        EngineRankError: a rank did not start, or failed.
    """

    def __init__(self, name: str, settings: EngineSettings, contract: TokenContract) -> None:
        self._name = name
        self._timeout_s = settings.actors.health_timeout_s
        self._others: list[ActorHandle] = []
        self._unsent: list[EngineCall] = []
        # Calls to all other ranks, and the digest of rank 0 when it had made the same call itself.
        self._pending: deque[tuple[list[RemoteCall[int]], int]] = deque()
        self._leader: LeadingEngine | None = None
        self.engine: BackspaceEngine
        if settings.actors.tensor_parallel_size > 1:
            self.engine = self._divided(settings, contract)
            self.settle()
        else:
            # Not at the top: importing these classes should not load vLLM.
            from actors.engine.engine import BackspaceEngine

            self.engine = BackspaceEngine(settings, contract)
        self.loader = WeightLoader(self.engine)

    def _divided(self, settings: EngineSettings, contract: TokenContract) -> LeadingEngine:
        size = settings.actors.tensor_parallel_size
        node_id = ray.get_runtime_context().get_node_id()
        process = ray.remote(EngineRank).options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        )
        self._others = [process.remote(os.environ.get(VISIBLE_GPUS)) for _ in range(1, size)]
        ready = self._calls([rank.ready.remote() for rank in self._others])
        from actors.engine.ranked_engine import LeadingEngine, RankPlace

        for call in ready:
            _answer(call, settings.actors.start_timeout_s)
        rendezvous_file = str(Path(settings.model_dir, "rendezvous"))
        places = [RankPlace(rank, size, rendezvous_file, self._timeout_s) for rank in range(size)]
        building = [
            rank.build.remote(settings, contract, place) for rank, place in zip(self._others, places[1:], strict=True)
        ]
        with self._together(building):
            self._leader = LeadingEngine(settings, contract, places[0], self._unsent, self._repeated)
        return self._leader

    def load_weights(self, manifest: WeightManifest, handle: WeightHandle) -> None:
        """Load a publication into the engines of all ranks; each rank fetches it. Raises as `WeightLoader.load`."""
        alone = self._leader is None
        with nullcontext() if alone else self._repeated(publication=(manifest, handle)):
            self.loader.load(manifest, handle)

    def settle(self) -> None:
        """Wait until all ranks have made the calls of rank 0; EngineRankError where they sampled other tokens."""
        while self._pending:
            self._check_oldest()

    def _repeated(self, *calls: EngineCall, publication: Publication | None = None) -> AbstractContextManager[None]:
        """Send these calls to the other ranks; open while rank 0 makes them itself."""
        sent = [*self._unsent, *calls]
        self._unsent.clear()
        return self._together([rank.repeat.remote(sent, publication) for rank in self._others])

    @contextmanager
    def _together(self, answers: list[ray.ObjectRef]) -> Iterator[None]:
        """Open while rank 0 makes the call that the others answer with `answers`."""
        # The answers of the last step are rarely there yet, and a check costs as much as reading them.
        while len(self._pending) > 1 and (
            len(self._pending) > NUM_UNANSWERED or all(call.done() for call in self._pending[0][0])
        ):
            self._check_oldest()
        calls = self._calls(answers)
        try:
            yield
        except WeightMismatchError:
            raise  # all ranks find the same mismatch
        except RuntimeError as error:
            # A dead rank is the cause; the others failed because it is missing.
            ray.wait(answers, num_returns=len(answers), timeout=BLAME_TIMEOUT_S)
            together = f"{len(answers) + 1} ranks of {self._name} failed together"
            _, reason = min(filter(None, (_failure(call, 0.0) for call in calls)), default=(0, together))
            raise EngineRankError(f"{reason}: {_first_line(error)}") from error
        assert self._leader is not None
        self._pending.append((calls, self._leader.digest))

    def _check_oldest(self) -> None:
        calls, digest = self._pending.popleft()
        for call in calls:
            if _answer(call, self._timeout_s) != digest:
                raise EngineRankError(
                    f"{call.who} sampled other tokens than rank 0; the rollouts since the last flush are "
                    "dropped. If it happens again, set actors.tensor_parallel_size=1"
                )

    def _calls(self, answers: Sequence[ray.ObjectRef]) -> list[RemoteCall[int]]:
        return [RemoteCall(f"rank {rank} of {self._name}", answer) for rank, answer in enumerate(answers, start=1)]


def _answer(call: RemoteCall[int], timeout_s: float) -> int:
    failure = _failure(call, timeout_s)
    if failure is not None:
        raise EngineRankError(failure[1])
    return call.result(timeout_s)


def _failure(call: RemoteCall[int], timeout_s: float) -> tuple[int, str] | None:
    """Order of the cause (0 = most likely the first failure) and description of a failed call; None if it succeeded."""
    try:
        call.result(timeout_s)
    except ray.exceptions.RayTaskError as error:
        return 2, f"{call.who} failed: {type(error.cause).__name__}: {_first_line(error.cause)}"
    except NoAnswerError:
        return 1, f"{call.who} did not answer" + (f" for {timeout_s:g} s" if timeout_s else "")
    except ProcessLostError:
        return 0, f"{call.who} died"
    return None


def _first_line(error: BaseException) -> str:
    """Its message without the stack of C++ calls that torch appends."""
    return str(error).partition("\n")[0]
