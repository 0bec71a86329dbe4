"""The tokenizer of a run, for commands that show text: saved in the run folder before the first rollout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from buffer.disk import writing_to
from buffer.trajectory.schema import TokenContract

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FOLDER = "tokenizer"
_TOKENIZER_FILE = "tokenizer_config.json"


def save_run_tokenizer(tokenizer: PreTrainedTokenizerBase, run: Path) -> None:
    """Write the tokenizer of a run's task into the run folder, where it may be already; OSError of a full disk."""
    with writing_to(run / TOKENIZER_FOLDER):
        tokenizer.save_pretrained(run / TOKENIZER_FOLDER)


def load_run_tokenizer(run: Path, contract: TokenContract) -> PreTrainedTokenizerBase:
    """The tokenizer that the trajectories of `run` were written with; from a checkpoint where the run saved none.

    Raises:
        ValueError: there is none, or only one whose ids mean other tokens. OSError: it cannot be read.
    """
    candidates = [run / TOKENIZER_FOLDER, *sorted((run / "checkpoints").glob("*/step-*"))]
    folders = [folder for folder in candidates if (folder / _TOKENIZER_FILE).is_file()]
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
