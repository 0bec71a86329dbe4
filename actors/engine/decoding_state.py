"""What the engine knows about one request beyond its text: written by the scheduler, read by the logits
processor.

Both see the same object (it travels in the request's sampling parameters, inside one process), so it survives
a preemption, after which vLLM rebuilds everything else about a request from its reduced text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

EXTRA_ARGS_KEY = "sequencematch"
"""Key of the state in `SamplingParams.extra_args`."""


class _Params(Protocol):
    @property
    def extra_args(self) -> Mapping[str, object] | None: ...


@dataclass(slots=True)
class DecodingState:
    """Decoding state of one request.

    planted: token ids forced as the first actions, in order. Counted by actions: once deleted they stay
        deleted.
    always_masked: ids that are never sampled.
    num_cacheable_tokens: leading tokens whose key-value blocks may be shared; None where nothing is ever
        rewritten.
    banned: banned[d] holds the ids deleted at the current text's prefix of d generated tokens. A stack is
        enough: a text that was taken back can't come back, because its last token is banned from then on.
    """

    backspace_id: int
    allow_backspace: bool
    max_actions: int
    planted: tuple[int, ...] = ()
    always_masked: tuple[int, ...] = ()
    ban_deleted: bool = False
    num_cacheable_tokens: int | None = None
    num_actions: int = 0
    banned: list[list[int]] = field(default_factory=lambda: [[]])

    @property
    def forced_token(self) -> int | None:
        """The planted id that the next action must be, if any is left."""
        return self.planted[self.num_actions] if self.num_actions < len(self.planted) else None

    def is_backspace(self, token_id: int) -> bool:
        """True where this id takes a token back instead of being appended."""
        return self.allow_backspace and token_id == self.backspace_id

    def record_append(self) -> None:
        """Count an appended token."""
        self.num_actions += 1
        if self.ban_deleted:
            self.banned.append([])

    def record_deletion(self, deleted_id: int) -> None:
        """Count a backspace that took `deleted_id` back."""
        self.num_actions += 1
        if self.ban_deleted:
            self.banned.pop()
            self.banned[-1].append(deleted_id)


def decoding_state(params: _Params | None) -> DecodingState | None:
    """The state in a request's sampling parameters; None for requests without one (probes)."""
    if params is None or params.extra_args is None:
        return None
    state = params.extra_args.get(EXTRA_ARGS_KEY)
    assert state is None or isinstance(state, DecodingState)
    return state
