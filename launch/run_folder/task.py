"""What a run folder keeps of the run's task: a fingerprint of its examples, so that a run never goes on with others,
and its tokenizer, for commands that show text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from buffer.disk import writing_to
from buffer.trajectory.schema import TokenContract
from launch.errors import UserError
from launch.run_folder.folder import has_begun

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from buffer.experts.tasks import Task

EXAMPLES_FILE = "examples.json"
TOKENIZER_FOLDER = "tokenizer"


def check_examples(task: Task, run: Path) -> None:
    """Note what the examples of a run are; UserError if it has taken steps with other examples than these."""
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


def save_run_tokenizer(tokenizer: PreTrainedTokenizerBase, run: Path) -> None:
    """Write the tokenizer of a run's task into the run folder, where it may be already."""
    with writing_to(run / TOKENIZER_FOLDER):
        tokenizer.save_pretrained(run / TOKENIZER_FOLDER)


def load_run_tokenizer(run: Path, contract: TokenContract) -> PreTrainedTokenizerBase:
    """The tokenizer that the trajectories of `run` were written with; from a checkpoint where the run saved none.
    ValueError: there is none, or only one whose ids mean other tokens. OSError: it cannot be read.
    """
    candidates = [run / TOKENIZER_FOLDER, *sorted((run / "checkpoints").glob("*/step-*"))]
    folders = [folder for folder in candidates if (folder / "tokenizer_config.json").is_file()]
    if not folders:
        raise ValueError(
            f"{run} holds no tokenizer, neither in {TOKENIZER_FOLDER}/ nor in a checkpoint: leave the columns of text "
            "out, e.g. select * exclude (prompt_text, final_text, marked_text)"
        )
    from transformers import AutoTokenizer

    from buffer.experts.tokenizer import tokenizer_hash

    for folder in folders:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if tokenizer_hash(tokenizer) == contract.tokenizer_hash:
            return tokenizer
    raise ValueError(
        f"the tokenizer in {folders[0]} is not the one that the trajectories were written with (hash "
        f"{contract.tokenizer_hash}): leave the columns of text out"
    )
