"""Character tokenizer of models trained from scratch, and the hash that ties trajectories to a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from buffer.trajectory.schema import TokenContract

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, BOS, EOS, BACKSPACE = "<pad>", "<bos>", "<eos>", "<backspace>"


def character_tokenizer(alphabet: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character of `alphabet`, and ids 0-3 for the special tokens, which encoding never
    adds. Decoding gives the text back exactly; encoding a character outside the alphabet raises."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = sorted(set(alphabet))
    if not characters or any(len(character) != 1 for character in characters):
        raise ValueError(f"the alphabet must be a non-empty collection of single characters, not {characters!r}")
    vocabulary = {token: index for index, token in enumerate([PAD, BOS, EOS, BACKSPACE, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    # `.` would leave line breaks out.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[BACKSPACE],
        clean_up_tokenization_spaces=False,
    )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """32 hexadecimal digits over the vocabulary and the special tokens: equal in every process and on every host."""
    description = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special_ids": sorted(tokenizer.all_special_ids),
        "roles": {role: str(token) for role, token in sorted(tokenizer.special_tokens_map.items())},
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(description, ensure_ascii=False).encode())


def token_contract(
    tokenizer: PreTrainedTokenizerBase,
    backspace_id: int,
    vocab_size: int | None = None,
    other_eos_ids: tuple[int, ...] = (),
) -> TokenContract:
    """The contract of trajectories written with `tokenizer`. vocab_size: the model's (rows of its embedding, of which
    some may have no token); by default the tokenizer's. ValueError where the tokenizer has no end-of-text token, or an
    id lies outside the vocabulary."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token; set tokenizer.eos_token")
    ids = np.array(list(tokenizer.get_vocab().values()), dtype=np.int64)
    largest = int(ids.max())
    size = largest + 1 if vocab_size is None else vocab_size
    if size <= largest:
        raise ValueError(f"the model's vocabulary ({size} ids) is smaller than the tokenizer's ({largest + 1} ids)")
    bounds = np.unique(np.concatenate([[-1, backspace_id, size], ids]))
    gaps = np.flatnonzero(np.diff(bounds) > 1)
    return TokenContract(
        vocab_size=size,
        backspace_id=backspace_id,
        eos_id=tokenizer.eos_token_id,
        tokenizer_hash=tokenizer_hash(tokenizer),
        ids_without_token=tuple((int(bounds[gap]) + 1, int(bounds[gap + 1])) for gap in gaps),
        other_eos_ids=other_eos_ids,
    )


def backspace_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of `<backspace>` in a tokenizer made by `character_tokenizer`; ValueError where it has none."""
    token_id: int | None = tokenizer.get_vocab().get(BACKSPACE)
    if token_id is None:
        raise ValueError(f"the tokenizer has no {BACKSPACE} token; pass the backspace id of the model")
    return token_id


def prompt_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text of its own accord: `[bos]`, or nothing."""
    ids: list[int] = tokenizer("")["input_ids"]
    return ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []
