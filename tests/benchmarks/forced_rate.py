"""A logits processor that takes tokens back at an exact rate, for benchmarks only.

It goes into both engines that are compared. In the plain one it forces an ordinary token just as often, so that the
ratio of the two contains the roll-back and nothing of the forcing.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates


class ForcedRateProcessor(LogitsProcessor):  # type: ignore[misc]  # vLLM ships no types
    """Class variables, because vLLM builds the instance.

    rate: share of the actions after a text's first token that are forced.
    forced_id: the id they get. masked_ids: ids that are never sampled otherwise.
    """

    rate: ClassVar[float] = 0.0
    forced_id: ClassVar[int] = 0
    masked_ids: ClassVar[tuple[int, ...]] = ()

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._outputs: dict[int, list[int]] = {}
        self._noise = np.random.default_rng(0)
        self._masked = torch.tensor(self.masked_ids, dtype=torch.int64, device=device)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Accept everything."""

    def is_argmax_invariant(self) -> bool:
        """False: it decides what is sampled."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Keep each row's generated text; vLLM updates the list in place."""
        process_dict_updates(self._outputs, batch_update, lambda params, prompt, output: output)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Force some rows of `logits` [batch, vocabulary], in place."""
        logits[:, self._masked] = float("-inf")
        noise = self._noise.random(len(logits)) < self.rate
        rows = [row for row, output in self._outputs.items() if output and noise[row]]
        if rows:
            logits[rows] = float("-inf")
            logits[rows, self.forced_id] = 0.0
        return logits
