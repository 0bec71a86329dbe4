"""The banned-token stack against the rule it stands for, on random trajectories."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from actors.engine.backspace_scheduler import DecodingState

BACKSPACE_ID = 3


@given(st.lists(st.integers(0, 7), max_size=80))
def test_banned_tokens_are_those_deleted_at_this_text(choices: list[int]) -> None:
    """Rule: a token deleted at a text is banned at that text. The stack must know exactly these."""
    state = DecodingState(BACKSPACE_ID, allow_backspace=True, max_actions=100, ban_deleted=True)
    text: list[int] = []
    banned: dict[tuple[int, ...], set[int]] = {}
    num_actions = 0
    for choice in choices:
        if state.is_backspace(choice):
            if not text:
                continue  # masked at the floor
            deleted = text.pop()
            banned.setdefault(tuple(text), set()).add(deleted)
            state.record_deletion(deleted)
        else:
            if choice in banned.get(tuple(text), ()):
                continue  # masked as banned
            text.append(choice)
            state.record_append()
        num_actions += 1
        assert sorted(state.banned[-1]) == sorted(banned.get(tuple(text), ()))
        assert state.num_actions == num_actions
