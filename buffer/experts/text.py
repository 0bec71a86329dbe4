"""Text documents cut into prompts and continuations.

Documents are split into training and held-out documents before anything is cut, so that no text is in both. A
document of L tokens, with `<eos>` appended, is cut into consecutive windows of `prompt_tokens +
target_tokens`; the last window may be shorter. Only its target ends in `<eos>`; the other windows are
truncated texts, and their trajectories say so. A last window without room for a target is left out.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from buffer.experts.noise import NoiseCandidates
from buffer.experts.ragged import Int32, Int64, Ragged, index_ranges
from buffer.experts.tokenizer import prompt_prefix
from buffer.settings import TextTaskSettings

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def split_documents(documents: Dataset, settings: TextTaskSettings) -> tuple[Dataset, Dataset]:
    """(train, held-out) documents, chosen at random by the seed; at least one in each.

    Raises:
        ValueError: fewer than two documents.
    """
    count = len(documents)
    if count < 2:
        raise ValueError(
            f"data set {settings.dataset!r} has {count} documents; two are needed, as one part is held out by document"
        )
    num_held_out = min(max(1, round(settings.held_out_fraction * count)), count - 1)
    order = np.random.default_rng(settings.seed).permutation(count)
    return documents.select(np.sort(order[num_held_out:])), documents.select(np.sort(order[:num_held_out]))


def cut_examples(
    documents: Dataset, settings: TextTaskSettings, tokenizer: PreTrainedTokenizerBase, backspace_id: int
) -> Dataset:
    """Examples of the documents: `prompt_ids`, `target_ids` (at least one id), `noise_group` (0) and
    `document`.

    Raises:
        ValueError: no document is longer than a prompt, or a text encodes to `<eos>` or backspace.
    """
    cut = functools.partial(
        _cut_batch,
        tokenizer=tokenizer,
        eos_id=tokenizer.eos_token_id,
        backspace_id=backspace_id,
        prefix=prompt_prefix(tokenizer),
        prompt_tokens=settings.prompt_tokens,
        target_tokens=settings.target_tokens,
    )
    examples = documents.with_format("arrow").map(
        cut, batched=True, with_indices=True, remove_columns=["text"], desc="tokenise"
    )
    if len(examples) == 0:
        raise ValueError(
            f"none of {len(documents)} documents of {settings.dataset!r} is longer than prompt_tokens="
            f"{settings.prompt_tokens}; lower it or give longer documents"
        )
    return examples.with_format(None)


def unigram_candidates(examples: Dataset, tokenizer: PreTrainedTokenizerBase) -> NoiseCandidates:
    """Ids as frequent as in the targets of `examples`, special tokens left out.

    Raises:
        ValueError: the targets hold nothing but special tokens.
    """
    counts = np.zeros(len(tokenizer), dtype=np.float64)
    for batch in examples.select_columns(["target_ids"]).with_format("arrow").iter(batch_size=10_000):
        counts += np.bincount(Ragged.from_arrow(batch.column("target_ids")).values, minlength=len(counts))
    counts[tokenizer.all_special_ids] = 0
    (ids,) = np.nonzero(counts)
    if len(ids) == 0:
        raise ValueError(
            "every target is <eos> alone, since no document is longer than its prompt: lower prompt_tokens or give "
            "longer documents"
        )
    return NoiseCandidates.weighted([ids.astype(np.int32)], [counts[ids]])


def _cut_batch(
    batch: pa.Table,
    indices: list[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    eos_id: int,
    backspace_id: int,
    prefix: list[int],
    prompt_tokens: int,
    target_tokens: int,
) -> pa.Table:
    # Text that spells a special token stays text: only the end of a document makes an <eos>.
    encoded = tokenizer(
        batch.column("text").to_pylist(),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    lengths = np.array([len(ids) for ids in encoded], dtype=np.int64) + 1
    values = np.concatenate([np.append(np.asarray(ids, dtype=np.int32), np.int32(eos_id)) for ids in encoded])
    texts = Ragged.from_lengths(lengths, values)
    num_special = np.count_nonzero((texts.values == eos_id) | (texts.values == backspace_id))
    if num_special != texts.num_rows:
        raise ValueError(
            f"documents encode to <eos> ({eos_id}) or backspace ({backspace_id}) in the middle of the text "
            f"{num_special - texts.num_rows} times; remove these from the text or choose "
            "another backspace token"
        )
    document, starts, sizes = _windows(texts, prompt_tokens, prompt_tokens + target_tokens)
    return pa.table(
        {
            "prompt_ids": _prepend(prefix, texts.values[starts[:, None] + np.arange(prompt_tokens)]),
            "target_ids": _slices(texts.values, starts + prompt_tokens, sizes - prompt_tokens),
            "noise_group": pa.array(np.zeros(len(starts)), pa.int32()),
            "document": pa.array(np.asarray(indices)[document], pa.int64()),
        }
    )


def _windows(texts: Ragged, prompt_tokens: int, window_tokens: int) -> tuple[Int64, Int64, Int64]:
    """(text, start, size) of each window: [E] each. Starts are flat; sizes exceed prompt_tokens."""
    per_text = -(-texts.lengths // window_tokens)
    text = np.repeat(np.arange(texts.num_rows), per_text)
    starts = texts.offsets[:-1][text] + window_tokens * index_ranges(np.zeros_like(per_text), per_text)
    sizes = np.minimum(window_tokens, texts.offsets[1:][text] - starts)
    keep = sizes > prompt_tokens
    return text[keep], starts[keep], sizes[keep]


def _prepend(prefix: list[int], prompts: Int32) -> pa.ListArray:
    # prompts: [E, prompt_tokens]
    rows = np.concatenate([np.tile(np.array(prefix, dtype=np.int32), (len(prompts), 1)), prompts], axis=1)
    return Ragged.from_lengths(np.full(len(rows), rows.shape[1]), rows.reshape(-1)).to_arrow()


def _slices(values: Int32, starts: Int64, lengths: Int64) -> pa.ListArray:
    return Ragged.from_lengths(lengths, values[index_ranges(starts, lengths)]).to_arrow()
