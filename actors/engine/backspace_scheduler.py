"""Backspace inside vLLM: a scheduler that shortens a request when the model takes a token back.

The scheduler is the only owner of a request's length. Each step it tells the V1 runner how many tokens are
computed and how many were generated, and the runner cuts its own copy to that. Popping a token here is
therefore the whole roll-back: the next step runs the last remaining token again (one ordinary decode step)
and overwrites its key-value entry with the same value. That is safe only in a block nobody else reads, so a
request with backspace neither shares nor looks up a block that holds its last prompt token or anything after
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vllm.v1.core.sched.request_queue import RequestQueue, create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.request import Request, RequestStatus

from actors.engine.action_log import STOP_MAX_ACTIONS
from actors.engine.checks import check_kv_cache, check_vllm_config
from actors.engine.decoding_state import DecodingState, decoding_state


class BackspaceScheduler(Scheduler):  # type: ignore[misc]  # vLLM ships no types
    """vLLM's scheduler, plus roll-back, an action limit, and a way to run one request alone."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        check_vllm_config(self.vllm_config)
        check_kv_cache(self.kv_cache_config)
        coordinator = self.kv_cache_manager.coordinator
        coordinator.cache_blocks = _limited_to_private_blocks(coordinator.cache_blocks)

    def add_request(self, request: Request) -> None:
        """Queue a request; one with backspace keeps its generated blocks private."""
        state = decoding_state(request.sampling_params)
        if state is not None and state.allow_backspace:
            assert not request.resumable
            assert not request.use_structured_output
            # vLLM itself never reuses the block of the last prompt token, so rollouts of one prompt lose
            # nothing.
            state.num_cacheable_tokens = request.num_prompt_tokens - 1
            request._block_hasher = None
            del request.block_hashes[state.num_cacheable_tokens // self.hash_block_size :]
        super().add_request(request)

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        """Apply one sampled action. The ids go out unchanged: the request's output is its action log."""
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
            _take_back(request, state)
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
    def others_held_back(self) -> Iterator[None]:
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


def _take_back(request: Request, state: DecodingState) -> None:
    assert request._output_token_ids, "backspace at the floor: the logits processor must mask it"
    deleted_id = request._output_token_ids.pop()
    request._all_token_ids.pop()
    # The last remaining token is computed again: its logits are those of the shorter text.
    request.num_computed_tokens = request.num_tokens - 1
    state.record_deletion(deleted_id)


def _limited_to_private_blocks(
    cache_blocks: Callable[[Request, int], None],
) -> Callable[[Request, int], None]:
    """Stop the prefix cache at the last block that a request can't rewrite any more."""

    def limited(request: Request, num_computed_tokens: int) -> None:
        state = decoding_state(request.sampling_params)
        if state is not None and state.num_cacheable_tokens is not None:
            num_computed_tokens = min(num_computed_tokens, state.num_cacheable_tokens)
        cache_blocks(request, num_computed_tokens)

    return limited
