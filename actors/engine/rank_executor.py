"""One of the ranks that hold a model together: its worker, its way to the others, and a digest of what it drew.

Each rank is a whole engine that makes the same calls in the same order as the others, so that all of them schedule and
draw alike; only the layers are divided. The logits are gathered by all of them, bit for bit the same.
"""

from __future__ import annotations

import os
import socket
import zlib
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.outputs import ModelRunnerOutput


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


def join_ranks(place: RankPlace) -> None:
    """Become one rank of the process's group of all ranks; returns when they are all there.

    Raises:
        RuntimeError: not all of them came in time.
    """
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


class RankExecutor(UniProcExecutor):  # type: ignore[misc]  # vLLM ships no types
    """vLLM's executor in the engine's own process, as one of the ranks that `join_ranks` has connected.

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
