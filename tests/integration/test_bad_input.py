"""What a person can get wrong ends `sequencematch train` with exit code 2, one line, and nothing left running."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from tests.integration.local_ray import cluster_to_join
from tests.integration.train_process import ARITHMETIC, TINY, refusal_of
from tests.tiny_models import VOCAB_SIZE, save_tiny_model, tiny_model

pytestmark = pytest.mark.slow

TEXT = "launch/recipes/text_cpu.yaml"


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with cluster_to_join() as address:
        yield address


def test_missing_model_folder(cluster: str, tmp_path: Path) -> None:
    missing = tmp_path / "models" / "nothing-here"
    assert str(missing) in refusal_of(tmp_path / "runs", TEXT, cluster, f"model.name={missing}")


def test_answers_longer_than_the_context(cluster: str, tmp_path: Path) -> None:
    overrides = [override for override in TINY if not override.startswith("cluster.")]
    error = refusal_of(tmp_path, ARITHMETIC, *overrides, cluster, "actors.rollout.max_new_tokens=60")
    assert "actors.rollout.max_new_tokens=60" in error
    assert "context of 64 tokens" in error


def test_vocabulary_without_room_for_backspace(cluster: str, tmp_path: Path) -> None:
    """The recipe's token is not in the vocabulary, and no row may be added."""
    folder = save_tiny_model(tmp_path / "model", tiny_model())
    words = {f"w{index}": index for index in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w4"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2", unk_token="w4").save_pretrained(folder)
    error = refusal_of(tmp_path / "runs", TEXT, cluster, f"model.name={folder}", "model.add_backspace_row=false")
    assert "<empty_output>" in error
    assert "add_backspace_row" in error
