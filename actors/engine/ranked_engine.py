"""Engines that are ranks of one model: each has a part of every layer. All ranks make the same calls in the same order
and gather the same logits, bit for bit, so they schedule and sample alike. Callers use rank 0, a `LeadingEngine`, like
any engine; the other ranks repeat its calls.
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
"""A method call that each rank makes on its own engine; `operator.methodcaller`, since Ray can pickle it."""


@dataclass(frozen=True)
class RankPlace:
    """The place of an engine among the `size` ranks of a model, all on one machine; rank 0 leads.

    rendezvous_file: the same path on all ranks, in a folder of their own; not needed after they have connected.
    timeout_s: longest wait for the others, when they connect and in every collective.
    """

    rank: int
    size: int
    rendezvous_file: str
    timeout_s: float


class RankExecutor(UniProcExecutor):  # type: ignore[misc]  # vLLM ships no types
    """vLLM's executor in the engine's own process, as one rank of the process group that the engine has joined.

    vLLM's `external_launcher` is similar, but gives all ranks of all engines on a machine the same name in shared
    memory.
    """

    digest: int = 0
    """Digest of all sampled tokens and their log-probabilities; equal on all ranks unless they have diverged."""

    def _distributed_args(self) -> tuple[str, int, int]:
        rank = dist.get_rank()
        # On CPU, ranks with the same name exchange tensors in shared memory. There they wait in a loop that neither a
        # rank's death nor a time-out ends. With different names they use the process group.
        return f"rank-{rank}", rank, rank

    def sample_tokens(self, grammar_output: GrammarOutput | None, non_block: bool = False) -> ModelRunnerOutput:
        """Sample a token for each row of the batch."""
        assert not non_block, "only pipeline parallelism has batches in flight"
        output: ModelRunnerOutput = super().sample_tokens(grammar_output)
        if output.logprobs is not None:  # a step with only a probe samples nothing
            for sampled in (output.logprobs.logprob_token_ids, output.logprobs.logprobs):
                self.digest = zlib.crc32(sampled.tobytes(), self.digest)
        return output


class RankedEngine(BackspaceEngine):
    """An engine that has a part of each layer. It works only while the other ranks make the same calls.

    The constructors of all ranks return together. The constructor and every later step raise RuntimeError where another
    rank did not take part in time.
    """

    def __init__(self, settings: EngineSettings, contract: TokenContract, place: RankPlace) -> None:
        self._place = place
        loopback = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}  # Linux, macOS
        for library in ("GLOO", "NCCL") if loopback else ():
            # By default they use the address of the host name, which may be unreachable.
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", min(loopback))
        dist.init_process_group(
            current_platform.dist_backend,
            store=dist.FileStore(place.rendezvous_file, place.size),
            rank=place.rank,
            world_size=place.size,
            timeout=timedelta(seconds=place.timeout_s),
        )
        super().__init__(settings, contract)
        torch.manual_seed(settings.seed)  # each rank may have used a different count of numbers so far

    def _engine_args(self, settings: EngineSettings) -> EngineArgs:
        args = super()._engine_args(settings)
        args.tensor_parallel_size = self._place.size
        args.distributed_executor_backend = RankExecutor
        # For the process groups that vLLM creates.
        args.distributed_timeout_seconds = args.cpu_distributed_timeout_seconds = max(1, round(self._place.timeout_s))
        return args

    @property
    def digest(self) -> int:
        """Digest of all sampled tokens; equal on all ranks after the same calls."""
        executor = self._core.model_executor
        assert isinstance(executor, RankExecutor)
        return executor.digest


class LeadingEngine(RankedEngine):
    """Rank 0. It does not send `load_weights` and `probe` to the other ranks: their owner calls them with its own data.

    unsent: list to which it appends calls that the other ranks make before the next step.
    together: sends a call to all other ranks, after the unsent ones; open while rank 0 makes the call itself.
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
