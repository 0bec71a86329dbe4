"""Engines that are ranks of one model: rank 0, a `LeadingEngine`, is used like any engine, and sends its calls to the
others, which repeat them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from operator import methodcaller

import torch
from vllm import EngineArgs

from actors.engine.engine import BackspaceEngine, TokenIds
from actors.engine.interface import EngineSettings, FinishedLog, SamplingSettings
from actors.engine.rank_executor import RankExecutor, RankPlace, join_ranks
from buffer.trajectory.schema import TokenContract

EngineCall = Callable[["RankedEngine"], object]
"""A call of a method, which each rank makes on its own engine: by `operator.methodcaller`, which can be sent."""


class RankedEngine(BackspaceEngine):
    """An engine that holds a part of each layer. It works only while the other ranks make the same calls.

    Args (beside those of `BackspaceEngine`):
        place: of this engine among the ranks. The constructors of all of them return together.

    Raises (beside what `BackspaceEngine` does):
        RuntimeError: the other ranks were not there in time, here or in any later step.
    """

    def __init__(
        self,
        settings: EngineSettings,
        contract: TokenContract,
        place: RankPlace,
        version: int = 0,
    ) -> None:
        self._place = place
        join_ranks(place)
        super().__init__(settings, contract, version)
        torch.manual_seed(settings.seed)  # building may have taken numbers, another amount on each rank

    def _engine_args(self, settings: EngineSettings) -> EngineArgs:
        args = super()._engine_args(settings)
        args.tensor_parallel_size = self._place.size
        args.distributed_executor_backend = RankExecutor
        # Of the groups that vLLM makes itself.
        args.distributed_timeout_seconds = args.cpu_distributed_timeout_seconds = max(1, round(self._place.timeout_s))
        return args

    @property
    def digest(self) -> int:
        """Of all that was drawn so far; the same on all ranks after the same calls."""
        executor = self._core.model_executor
        assert isinstance(executor, RankExecutor)
        return executor.digest

    def repeat(self, calls: Sequence[EngineCall]) -> None:
        """Make the calls that the leader made."""
        for call in calls:
            call(self)


class LeadingEngine(RankedEngine):
    """Rank 0. `load_weights` and `probe` are left to the owner: each rank has to be brought to them with its own data.

    Args (beside those of `RankedEngine`):
        broadcast: sends calls to all other ranks, in order, without waiting for them, and lasts as long as this rank
            makes them itself.
    """

    def __init__(
        self,
        settings: EngineSettings,
        contract: TokenContract,
        place: RankPlace,
        broadcast: Callable[[Sequence[EngineCall]], AbstractContextManager[None]],
        version: int = 0,
    ) -> None:
        self._broadcast = broadcast
        self._unsent: list[EngineCall] = []  # until the next step
        super().__init__(settings, contract, place, version)

    def add(self, request_id: str, prompt_ids: TokenIds, sampling: SamplingSettings, planted: TokenIds = ()) -> None:
        """See `BackspaceEngine.add`."""
        super().add(request_id, prompt_ids, sampling, planted)  # raises before the call is sent to the others
        self._unsent.append(methodcaller("add", request_id, prompt_ids, sampling, planted))

    def abort(self, request_ids: Iterable[str]) -> list[FinishedLog]:
        """See `BackspaceEngine.abort`."""
        ended = tuple(request_ids)
        self._unsent.append(methodcaller("abort", ended))
        return super().abort(ended)

    def flush(self) -> None:
        """Send the other ranks the calls that were not sent yet: needed before any other call to them."""
        if self._unsent:
            calls, self._unsent = self._unsent, []
            with self._broadcast(calls):
                pass  # made already

    def _step(self) -> list[FinishedLog]:
        calls: list[EngineCall] = [*self._unsent, methodcaller("_step")]
        self._unsent = []
        with self._broadcast(calls):
            return super()._step()
