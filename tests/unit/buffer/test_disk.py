"""A full disk is one kind of error, whichever library meets it. /dev/full refuses every byte, as a full disk does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from buffer.disk import is_disk_full, writing_to

FULL = Path("/dev/full")


def save_with_torch(path: Path) -> None:
    with path.open("wb") as file:
        torch.save({"weights": torch.zeros(100_000)}, file)


WRITERS = {
    "torch": save_with_torch,
    "python": lambda path: path.write_text("words"),
    "rust": lambda path: Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(path)),
}


@pytest.mark.parametrize("library", WRITERS)
def test_it_is_told_with_a_place(library: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.symlink_to(FULL)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: '/place'$"), writing_to(Path("/place")):
        WRITERS[library](file)


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing, writing_to(tmp_path):
        (tmp_path / "nowhere" / "file").write_text("")
    assert not is_disk_full(missing.value)
    assert not is_disk_full(None)
    with pytest.raises(ValueError, match="defect"), writing_to(tmp_path):
        raise ValueError("defect")
    save_file({"a": torch.zeros(1)}, tmp_path / "fine.safetensors")
