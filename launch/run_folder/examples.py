"""The fingerprint of a run's examples, so that a run never goes on with others than it began with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from buffer.disk import writing_to
from launch.errors import UserError
from launch.run_folder.folder import has_begun

if TYPE_CHECKING:
    from datasets import Dataset

    from buffer.experts.tasks import Task

EXAMPLES_FILE = "examples.json"


def check_examples(task: Task, run: Path) -> None:
    """Note what the examples of a run are, or see that they still are what it began with.

    Raises:
        UserError: the run has taken steps, with other examples. OSError: the disk refused.
    """
    file = run / EXAMPLES_FILE
    found = {name: _fingerprint(split) for name, split in (("training", task.train), ("held-out", task.held_out))}
    if not (file.is_file() and has_begun(run)):
        with writing_to(file):
            file.write_text(json.dumps(found, indent=1), encoding="utf-8")
        return
    noted = json.loads(file.read_text(encoding="utf-8"))
    for name, fingerprint in found.items():
        if noted[name] != fingerprint:
            raise UserError(
                f"the {name} examples are not those that the run began with: {_shown(noted[name])} then, "
                f"{_shown(fingerprint)} now. Put the data of the task back as they were (what they are depends on the "
                "tokenizer and on the version of the data set too), or start a new run"
            )


def _fingerprint(split: Dataset) -> dict[str, str | int]:
    """Number of the examples, and a hash of their prompts and targets in their order."""
    table: pa.Table = split.select_columns(["prompt_ids", "target_ids"]).with_format("arrow")[:]
    digest = xxhash.xxh3_128()
    for column in table.itercolumns():
        for numbers in (pc.list_value_length(column), pc.list_flatten(column)):
            digest.update(numbers.to_numpy().astype(np.int64).tobytes())
    return {"examples": table.num_rows, "hash": digest.hexdigest()}


def _shown(fingerprint: dict[str, str | int]) -> str:
    return f"{fingerprint['examples']} with hash {str(fingerprint['hash'])[:8]}"
