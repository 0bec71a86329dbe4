"""Masks of the sampling distribution: ids without a token, backspace at the floor, forced tokens, banned tokens.

They run before temperature and top-p, so the recorded log-probabilities are those of the renormalized distribution.
"""

from __future__ import annotations

import torch
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from actors.engine.backspace_scheduler import DecodingState, decoding_state
from buffer.trajectory.schema import IdRanges

IDS_WITHOUT_TOKEN = "sequencematch_ids_without_token"
"""Key of these ids in vLLM's `additional_config`; they are the same for every request."""


class BackspaceLogitsProcessor(LogitsProcessor):  # type: ignore[misc]  # vLLM ships no types
    """Applies each request's `DecodingState` to its row of the batch.

    A step of ordinary rollouts costs one scan for empty outputs. Tensors of masked cells are built only when the set
    of masked cells changes.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._ids_without_token: IdRanges = vllm_config.additional_config.get(IDS_WITHOUT_TOKEN, ())
        # Row of the batch -> (state, generated text). The list is the runner's own: already cut when apply() runs.
        self._rows: dict[int, tuple[DecodingState, list[int]]] = {}
        self._floor_rows: list[tuple[int, int, list[int]]] = []
        self._special_rows: list[tuple[int, DecodingState]] = []
        self._always_masked = _Cells(device)
        self._at_floor = _Cells(device)
        self._banned = _Cells(device)
        self._forced = _Cells(device)

    def is_argmax_invariant(self) -> bool:
        """False: a masked token can be the greedy one."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the rows of the persistent batch; vLLM asks for the order removed, added, moved."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._rows.pop(row, None)
        for row, params, _, output_ids in batch_update.added:
            self._rows.pop(row, None)
            state = decoding_state(params)
            if state is not None:
                self._rows[row] = (state, output_ids)
        for source, target, direction in batch_update.moved:
            moved, replaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if direction == MoveDirectionality.SWAP and replaced is not None:
                self._rows[source] = replaced
        rows = self._rows.items()
        self._floor_rows = [(row, s.backspace_id, out) for row, (s, out) in rows if s.allow_backspace]
        self._special_rows = [(row, s) for row, (s, _) in rows if s.ban_deleted or s.forced_prefix]
        self._always_masked.set([(row, token_id) for row, (s, _) in rows for token_id in s.always_masked])

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Mask `logits` [batch, vocabulary] in place."""
        if not self._rows:
            return logits
        for begin, end in self._ids_without_token:
            logits[:, begin:end] = -torch.inf
        self._always_masked.fill(logits, -torch.inf)
        self._at_floor.set([(row, backspace_id) for row, backspace_id, out in self._floor_rows if not out])
        self._at_floor.fill(logits, -torch.inf)
        if self._special_rows:
            self._banned.set([(row, token_id) for row, s in self._special_rows for token_id in s.banned[-1]])
            self._banned.fill(logits, -torch.inf)
            forced = ((row, s.forced_token) for row, s in self._special_rows)
            self._forced.set([(row, token_id) for row, token_id in forced if token_id is not None])
            self._forced.keep_only(logits)
        return logits


class _Cells:
    """Cells (row, token id) of the logits, kept on the device until they change."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pairs: list[tuple[int, int]] = []
        self._index = torch.empty((2, 0), dtype=torch.int64, device=device)

    def set(self, pairs: list[tuple[int, int]]) -> None:
        if pairs != self._pairs:
            self._pairs = pairs
            self._index = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T.to(self._device)

    def fill(self, logits: torch.Tensor, value: float) -> None:
        if self._pairs:
            logits[self._index[0], self._index[1]] = value

    def keep_only(self, logits: torch.Tensor) -> None:
        """Mask all other ids in the rows of these cells."""
        if self._pairs:
            logits[self._index[0]] = -torch.inf
            self.fill(logits, 0.0)
