"""Engines with one deliberate fault each: the checks must notice them."""

from __future__ import annotations

from typing import ClassVar

import torch
from vllm.v1.request import Request

from actors.engine.backspace_scheduler import BackspaceScheduler, decoding_state
from actors.engine.engine import BackspaceEngine
from actors.engine.logits_processor import BackspaceLogitsProcessor


class SharesGeneratedBlocks(BackspaceScheduler):  # type: ignore[misc]
    """Puts generated blocks into the prefix cache as vLLM does by default, and forgets the hashes on a roll-back."""

    def add_request(self, request: Request) -> None:
        hasher, hashes = request._block_hasher, list(request.block_hashes)
        super().add_request(request)
        request._block_hasher, request.block_hashes[:] = hasher, hashes
        state = decoding_state(request.sampling_params)
        assert state is not None
        state.num_cacheable_tokens = None

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        result = super()._update_request_with_output(request, new_token_ids, is_stale)
        del request.block_hashes[request.num_tokens // self.hash_block_size :]
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            cached = manager.num_cached_block.get(request.request_id, 0)
            manager.num_cached_block[request.request_id] = min(cached, len(request.block_hashes))
        return result


class SharedBlocksEngine(BackspaceEngine):
    """An engine whose rollouts may read blocks that another one rewrites."""

    scheduler_cls: ClassVar[str] = "tests.integration.broken_engines.SharesGeneratedBlocks"


class ForgetsFloor(BackspaceLogitsProcessor):  # type: ignore[misc]
    """Masks nothing while the text is empty."""

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


class NoFloorEngine(BackspaceEngine):
    """An engine that may sample a backspace at the floor."""

    logits_processors: ClassVar[tuple[str, ...]] = ("tests.integration.broken_engines:ForgetsFloor",)
