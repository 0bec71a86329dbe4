"""Generation outside of training: one engine answers groups of prompts with the weights of a checkpoint. Creating a
`Generator` imports vLLM; set `engine_environment` before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from actors.engine.interface import EngineSettings, FinishedRollout, Int32, SamplingSettings, rollouts_to_batch
from buffer.trajectory.schema import TokenContract


@dataclass(frozen=True, eq=False)
class PromptGroup:
    """Prompts with the same sampling settings.

    prompts: token ids, one array [P] per request. forced_prefixes: per prompt, ids of its first actions.
    """

    prompts: Sequence[Int32]
    sampling: SamplingSettings
    forced_prefixes: Sequence[Sequence[int]] | None = None


class Generator:
    """An engine with the weights of a checkpoint; one per process. ValueError: it cannot be built."""

    def __init__(self, settings: EngineSettings, contract: TokenContract) -> None:
        from actors.engine.engine import BackspaceEngine

        self._engine = BackspaceEngine(settings, contract)

    def load(self, checkpoint: Path) -> None:
        """Replace the weights, in place, by those of a checkpoint of the same model.

        The sampling noise starts again from the seed, so the texts of a checkpoint do not depend on earlier calls, and
        all checkpoints of a comparison get the same noise.
        ValueError: the folder holds no safetensors file, or tensors of another model.
        """
        import torch
        from safetensors.torch import load_file

        files = sorted(checkpoint.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{checkpoint} holds no weights: it has no *.safetensors file")
        tensors = (entry for file in files for entry in load_file(file).items())
        self._engine.load_weights(tensors, self._engine.version + 1)
        torch.manual_seed(self._engine.settings.seed)

    def generate(
        self, groups: Mapping[str, PromptGroup], task: str, on_finished: Callable[[int], None] | None = None
    ) -> dict[str, pa.RecordBatch]:
        """Answer every prompt of every group; gives the trajectories of each group, in the order of its prompts.

        task: written into the trajectories. on_finished: called after each engine step with the number of requests
            that it ended. ValueError: a prompt does not fit into the engine's `max_length`.
        """
        for name, group in groups.items():
            prefixes = [()] * len(group.prompts) if group.forced_prefixes is None else group.forced_prefixes
            for index, (prompt, forced) in enumerate(zip(group.prompts, prefixes, strict=True)):
                self._engine.add(f"{name}/{index}", prompt, group.sampling, forced)
        rollouts: dict[str, FinishedRollout] = {}
        while self._engine.num_unfinished:
            finished = self._engine.step()
            rollouts |= {rollout.request_id: rollout for rollout in finished}
            if finished and on_finished is not None:
                on_finished(len(finished))
        return {
            name: rollouts_to_batch(
                [rollouts[f"{name}/{index}"] for index in range(len(group.prompts))],
                self._engine.contract,
                task=task,
                actor="generator",
                sampling=group.sampling,
                weights_fingerprint=None,
            )
            for name, group in groups.items()
        }

    def close(self) -> None:
        """End the engine."""
        self._engine.shutdown()
