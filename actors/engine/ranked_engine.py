"""Engines that are ranks of one model: each holds a part of every layer. All make the same calls in the same order, so
that they schedule and draw alike; the logits are gathered by all of them, bit for bit the same. Rank 0, a
`LeadingEngine`, is used like any engine, and its calls are sent to the others, which repeat them.
"""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from operator import methodcaller

import torch
import torch.distributed as dist
from vllm import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.outputs import ModelRunnerOutput

from actors.engine.engine import BackspaceEngine, TokenIds
from actors.engine.interface import EngineSettings, FinishedRollout, SamplingSettings
from buffer.trajectory.schema import TokenContract

EngineCall = Callable[["RankedEngine"], object]
"""A call of a method, which each rank makes on its own engine: by `operator.methodcaller`, which can be sent."""


@dataclass(frozen=True)
class RankPlace:
    """Of an engine among the `size` ranks of a model, all on one machine; rank 0 leads.

    rendezvous_file: path that all of them name, in a folder of their own; not needed once they are connected.
    timeout_s: longest wait for the others, when they connect and in every collective.
    """

    rank: int
    size: int
    rendezvous_file: str
    timeout_s: float


class RankExecutor(UniProcExecutor):  # type: ignore[misc]  # vLLM ships no types
    """vLLM's executor in the engine's own process, as one rank of the process group that the engine has joined.

    vLLM's `external_launcher` is nearly that, but gives all ranks of one machine, of whatever engine, the same name in
    shared memory.
    """

    digest: int = 0
    """Of all tokens drawn so far and their log-probabilities: the same on all ranks, or they have parted."""

    def _distributed_args(self) -> tuple[str, int, int]:
        rank = dist.get_rank()
        # On CPU vLLM would let ranks of one name exchange tensors in shared memory, where they wait for each other in
        # a loop that neither a rank's death nor a time-out ends. By names that differ they use the process group.
        return f"rank-{rank}", rank, rank

    def sample_tokens(self, grammar_output: GrammarOutput | None, non_block: bool = False) -> ModelRunnerOutput:
        """Draw a token for each row of the batch."""
        assert not non_block, "needs batches in flight, of pipeline parallelism"
        output: ModelRunnerOutput = super().sample_tokens(grammar_output)
        if output.logprobs is not None:  # a probe alone draws nothing
            for drawn in (output.logprobs.logprob_token_ids, output.logprobs.logprobs):
                self.digest = zlib.crc32(drawn.tobytes(), self.digest)
        return output


class RankedEngine(BackspaceEngine):
    """An engine that holds a part of each layer. It works only while the other ranks make the same calls.

    The constructors of all ranks return together. A RuntimeError is raised where the others were not there in time,
    here or in any later step.
    """

    def __init__(self, settings: EngineSettings, contract: TokenContract, place: RankPlace) -> None:
        self._place = place
        loopback = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}  # Linux, macOS
        for library in ("GLOO", "NCCL") if loopback else ():
            # They would listen where the machine's name leads.
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", min(loopback))
        dist.init_process_group(
            current_platform.dist_backend,
            store=dist.FileStore(place.rendezvous_file, place.size),
            rank=place.rank,
            world_size=place.size,
            timeout=timedelta(seconds=place.timeout_s),
        )
        super().__init__(settings, contract)
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


class LeadingEngine(RankedEngine):
    """Rank 0. `load_weights` and `probe` are left to the owner: each rank has to be brought to them with its own data.

    unsent: gains the calls that the other ranks have to make before the next step.
    together: sends a call to all other ranks, after those unsent, and lasts as long as this rank makes it itself.
    """

    def __init__(
        self,
        settings: EngineSettings,
        contract: TokenContract,
        place: RankPlace,
        unsent: list[EngineCall],
        together: Callable[[EngineCall], AbstractContextManager[None]],
    ) -> None:
        self._unsent = unsent
        self._together = together
        super().__init__(settings, contract, place)

    def add(
        self, request_id: str, prompt_ids: TokenIds, sampling: SamplingSettings, forced_prefix: TokenIds = ()
    ) -> None:
        """See `BackspaceEngine.add`."""
        super().add(request_id, prompt_ids, sampling, forced_prefix)  # raises before the call is sent to the others
        self._unsent.append(methodcaller("add", request_id, prompt_ids, sampling, forced_prefix))

    def abort(self, request_ids: Iterable[str]) -> list[FinishedRollout]:
        """See `BackspaceEngine.abort`."""
        ended = tuple(request_ids)
        self._unsent.append(methodcaller("abort", ended))
        return super().abort(ended)

    def _step(self) -> list[FinishedRollout]:
        with self._together(methodcaller("_step")):
            return super()._step()
