"""Backspace inside vLLM: a scheduler that shortens a request when the model deletes a token.

Only the scheduler owns a request's length. In each step it tells the V1 runner how many tokens are computed and how
many were generated, and the runner cuts its own copy to that length. So popping a token here is the whole roll-back:
the next step runs the last token again (one ordinary decode step) and overwrites its key-value entry with the same
value. That is safe only in a block that no other request reads. So a request with backspace neither shares nor looks up
a block with its last prompt token or any later token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from vllm import SamplingParams
from vllm.v1.core.sched.request_queue import RequestQueue, create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.request import Request, RequestStatus

from actors.engine.checks import check_kv_cache, check_vllm_config

EXTRA_ARGS_KEY = "sequencematch"
"""Key of a request's `DecodingState` in `SamplingParams.extra_args`."""

STOP_MAX_ACTIONS = "max_actions"
"""vLLM's stop reason for the action limit; its finish reason is that of the length limit."""


@dataclass(slots=True)
class DecodingState:
    """State of one request beyond its text, for scheduler and logits processor.

    Both use the same object in the request's sampling parameters, inside one process. So it survives a preemption,
    after which vLLM rebuilds the rest of the request from its shortened text.

    forced_prefix: ids forced as the first actions, in order. Counted by actions: deleted ones are not forced again.
    always_masked: ids that are never sampled.
    num_cacheable_tokens: leading tokens whose key-value blocks may be shared; None where no block is rewritten.
    banned: banned[d] holds the ids deleted at the current text's prefix of d generated tokens. A stack is
        enough: a deleted text cannot occur again, because its last token is banned from then on.
    """

    backspace_id: int
    allow_backspace: bool
    max_actions: int
    forced_prefix: tuple[int, ...] = ()
    always_masked: tuple[int, ...] = ()
    ban_deleted: bool = False
    num_cacheable_tokens: int | None = None
    num_actions: int = 0
    banned: list[list[int]] = field(default_factory=lambda: [[]])

    @property
    def forced_token(self) -> int | None:
        """The id that the next action must be, if the forced prefix has not ended."""
        return self.forced_prefix[self.num_actions] if self.num_actions < len(self.forced_prefix) else None

    def is_backspace(self, token_id: int) -> bool:
        """Whether this id deletes a token and is not appended."""
        return self.allow_backspace and token_id == self.backspace_id

    def record_append(self) -> None:
        """Count an appended token."""
        self.num_actions += 1
        if self.ban_deleted:
            self.banned.append([])

    def record_deletion(self, deleted_id: int) -> None:
        """Count a backspace that deleted `deleted_id`."""
        self.num_actions += 1
        if self.ban_deleted:
            self.banned.pop()
            self.banned[-1].append(deleted_id)


def decoding_state(params: SamplingParams | None) -> DecodingState | None:
    """The state in a request's sampling parameters; None for requests without one (probes)."""
    if params is None or params.extra_args is None:
        return None
    state = params.extra_args.get(EXTRA_ARGS_KEY)
    assert state is None or isinstance(state, DecodingState)
    return state


class BackspaceScheduler(Scheduler):  # type: ignore[misc]  # vLLM ships no types
    """vLLM's scheduler, plus roll-back, an action limit, and a way to run one request alone."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        check_vllm_config(self.vllm_config)
        check_kv_cache(self.kv_cache_config)
        coordinator = self.kv_cache_manager.coordinator
        cache_blocks = coordinator.cache_blocks

        def cache_private_blocks(request: Request, num_computed_tokens: int) -> None:
            """Stop the prefix cache at the last block that the request can no longer rewrite."""
            state = decoding_state(request.sampling_params)
            if state is not None and state.num_cacheable_tokens is not None:
                num_computed_tokens = min(num_computed_tokens, state.num_cacheable_tokens)
            cache_blocks(request, num_computed_tokens)

        coordinator.cache_blocks = cache_private_blocks

    def add_request(self, request: Request) -> None:
        """Queue a request; one with backspace keeps its generated blocks private."""
        state = decoding_state(request.sampling_params)
        if state is not None and state.allow_backspace:
            assert not request.resumable
            assert not request.use_structured_output
            # vLLM itself never reuses the block of the last prompt token, so rollouts of one prompt lose nothing.
            state.num_cacheable_tokens = request.num_prompt_tokens - 1
            request._block_hasher = None
            del request.block_hashes[state.num_cacheable_tokens // self.hash_block_size :]
        super().add_request(request)

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        """Apply one sampled action. The ids go out unchanged: the request's output is its trajectory."""
        state = decoding_state(request.sampling_params)
        if state is None:
            result: tuple[list[int], bool] = super()._update_request_with_output(
                request, new_token_ids, is_stale=is_stale
            )
            return result
        assert len(new_token_ids) == 1
        assert not is_stale
        assert request.status == RequestStatus.RUNNING
        token_id = new_token_ids[0]
        stopped = False
        if state.is_backspace(token_id):
            assert request._output_token_ids, "backspace at the floor: the logits processor must mask it"
            state.record_deletion(request._output_token_ids.pop())
            request._all_token_ids.pop()
            # The last remaining token is computed again: its logits are those of the shorter text.
            request.num_computed_tokens = request.num_tokens - 1
        else:
            request.append_output_token_ids(token_id)
            state.record_append()
            stopped = check_stop(request, self.max_model_len)
        if not stopped and state.num_actions >= state.max_actions:
            request.status = RequestStatus.FINISHED_LENGTH_CAPPED
            request.stop_reason = STOP_MAX_ACTIONS
            stopped = True
        return new_token_ids, stopped

    @contextmanager
    def others_throttled(self) -> Iterator[None]:
        """While open, only requests added inside are scheduled; all earlier ones wait and keep their place.

        Running requests are preempted first (they compute their text again afterwards), which also gives the
        request inside the whole key-value cache.
        """
        self.reset_prefix_cache(reset_running_requests=True)
        assert not self.kv_holding_waiting  # needs a KV connector, refused at the start
        held = self.waiting
        self.waiting: RequestQueue = create_request_queue(self.policy)
        try:
            yield
        finally:
            assert not self.waiting
            self.waiting = held
