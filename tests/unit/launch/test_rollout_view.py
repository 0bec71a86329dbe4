"""Rollouts as text: marks, styles, and tokens that only make sense in their place."""

from __future__ import annotations

import pyarrow as pa
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from buffer.experts.tokenizer import character_tokenizer, token_contract
from buffer.trajectory.schema import TokenContract
from launch.rollout_view import view_rollout

TOKENIZER = character_tokenizer("0123456789?")
CONTRACT = token_contract(TOKENIZER, 3)


def ids_of(trajectory: str) -> list[int]:
    special = {"<": CONTRACT.backspace_id, ".": CONTRACT.eos_id}
    return [special[c] if c in special else TOKENIZER.convert_tokens_to_ids(c) for c in trajectory]


def batch_of(prompt: list[int], actions: list[int], executed: list[int | None] | None = None) -> pa.RecordBatch:
    int_list = pa.list_(pa.int32())
    finish = "eos" if actions[-1:] == [CONTRACT.eos_id] else "max_actions"
    # The rollout is the second row: views must look at their own row alone.
    return pa.record_batch(
        {
            "prompt_ids": pa.array([[5], prompt], int_list),
            "actions": pa.array([[7, 3, CONTRACT.eos_id], actions], int_list),
            "executed": pa.array([[8, None, None], executed], int_list),
            "finish_reason": ["eos", finish],
        }
    )


def plain(trajectory: str, executed: str | None = None, num_forced: int = 0) -> str:
    other = None if executed is None else [None if c == "_" else ids_of(c)[0] for c in executed]
    return view_rollout(batch_of(ids_of("1?"), ids_of(trajectory), other), 1, TOKENIZER, CONTRACT, num_forced).plain()


@pytest.mark.parametrize(
    ("trajectory", "expected"),
    [
        ("16.", "16"),
        ("17<6.", "1[-7-]6"),
        ("17<8<6.", "1[-7-][-8-]6"),  # two attempts, not one of two tokens
        ("179<<6.", "1[-79-]6"),
        ("179<8<<6.", "1[-79-][-8-]6"),
        ("16", "16…"),
        ("1<", "[-1-]…"),
        (".", ""),
        ("", "…"),
    ],
)
def test_plain_marks(trajectory: str, expected: str) -> None:
    assert plain(trajectory) == expected


def test_forced_and_noise_tokens_are_marked() -> None:
    assert plain("7<16.", num_forced=1) == "[-{7}-]16"
    assert plain("716.", num_forced=1) == "{7}16"
    # Noise: the label of the first action is 1, the environment wrote 7.
    assert plain("1<16.", "7____") == "[-{7}-]16"
    # Noise before <eos>: its label ends nothing.
    assert plain("16.<.", "__8__") == "16[-{8}-]"


def test_rich_styles() -> None:
    view = view_rollout(batch_of(ids_of("1?"), ids_of("78<<16")), 1, TOKENIZER, CONTRACT, num_forced=1)
    text = view.rich()
    assert text.plain == "1?│7816…"
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles == {"7": "dim strike yellow", "8": "dim strike red", "16": "not dim green"}
    assert text.style == "dim"


def test_control_characters_do_not_reach_the_terminal() -> None:
    tokenizer = character_tokenizer("\x1b\x07a\n\x9b")
    contract = token_contract(tokenizer, 3)
    ids = tokenizer("\x1ba\x07\x9b\n")["input_ids"]
    view = view_rollout(batch_of(ids, [*ids, contract.eos_id]), 1, tokenizer, contract)
    assert view.plain() == "�a��\n"
    assert view.prompt == "�a��\n"


def test_tokens_are_decoded_in_their_place() -> None:
    """A decoder that drops the space of a text's first token must not glue words together."""
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<backspace>": 3, "▁one": 4, "▁two": 5, "▁three": 6}
    words = Tokenizer(models.WordLevel(vocabulary))
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    contract = TokenContract(vocab_size=7, backspace_id=3, eos_id=2, tokenizer_hash="")
    assert tokenizer.decode([5]) == "two", "the decoder does drop the space"
    view = view_rollout(batch_of([4], [5, 3, 6, 2]), 1, tokenizer, contract)
    assert view.prompt == "one"
    assert view.plain() == "[- two-] three"


def test_backspace_at_the_floor_is_an_error() -> None:
    with pytest.raises(ValueError, match="at the floor"):
        plain("<1.")
