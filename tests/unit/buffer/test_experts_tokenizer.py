"""Character tokenizer and the hash of a tokenizer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from buffer.experts.tokenizer import backspace_token_id, character_tokenizer, token_contract, tokenizer_hash

ALPHABET = "ab <>?\n\t0é漢"
TOKENIZER = character_tokenizer(ALPHABET)


@given(st.text(alphabet=ALPHABET))
def test_text_round_trips_with_one_token_per_character(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert len(ids) == len(text)
    assert TOKENIZER.decode(ids) == text


def test_an_unknown_character_is_an_error_not_a_token() -> None:
    with pytest.raises(Exception, match="UNK"):
        TOKENIZER("abz")


def test_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_hash(loaded) == tokenizer_hash(TOKENIZER)
    assert loaded("a b\n")["input_ids"] == TOKENIZER("a b\n")["input_ids"]
    assert backspace_token_id(loaded) == backspace_token_id(TOKENIZER) == 3


def test_hash_depends_on_vocabulary_and_specials_alone() -> None:
    assert tokenizer_hash(character_tokenizer(reversed(ALPHABET))) == tokenizer_hash(TOKENIZER)
    assert tokenizer_hash(character_tokenizer(ALPHABET + "z")) != tokenizer_hash(TOKENIZER)
    other_eos = character_tokenizer(ALPHABET)
    other_eos.eos_token = "<bos>"
    assert tokenizer_hash(other_eos) != tokenizer_hash(TOKENIZER)


def test_hash_is_the_same_in_another_process() -> None:
    code = f"from buffer.experts.tokenizer import *;print(tokenizer_hash(character_tokenizer({ALPHABET!r})))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert other.stdout.strip() == tokenizer_hash(TOKENIZER)


def test_contract_refuses_what_cannot_be() -> None:
    assert token_contract(TOKENIZER, 3).vocab_size == len(TOKENIZER)
    assert token_contract(TOKENIZER, 3, vocab_size=64).vocab_size == 64
    with pytest.raises(ValueError, match="smaller than the tokenizer's"):
        token_contract(TOKENIZER, 3, vocab_size=5)
    with pytest.raises(ValueError, match=r"backspace 2 and the <eos> ids .* must differ"):
        token_contract(TOKENIZER, 2)
    with pytest.raises(ValueError, match="backspace 99 and"):
        token_contract(TOKENIZER, 99)


def test_contract_names_the_ids_without_a_token() -> None:
    size = len(TOKENIZER)
    assert token_contract(TOKENIZER, 3).ids_without_token == ()
    assert token_contract(TOKENIZER, 3, vocab_size=64).ids_without_token == ((size, 64),)
    assert token_contract(TOKENIZER, size, vocab_size=64).ids_without_token == ((size + 1, 64),)
    words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 5, "c": 6, "d": 9}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    assert token_contract(tokenizer, 2).ids_without_token == ((3, 5), (7, 9))
    assert token_contract(tokenizer, 2, vocab_size=12).ids_without_token == ((3, 5), (7, 9), (10, 12))
    with pytest.raises(ValueError, match=r"\(9 ids\) is smaller than the tokenizer's \(10 ids\)"):
        token_contract(tokenizer, 2, vocab_size=9)


@pytest.mark.parametrize("alphabet", ["", ["ab"]])
def test_alphabet_must_be_characters(alphabet: list[str] | str) -> None:
    with pytest.raises(ValueError, match="alphabet"):
        character_tokenizer(alphabet)
