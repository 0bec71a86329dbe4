"""A run goes on with the examples that it began with, and with no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from buffer.experts.tasks import load_task
from buffer.settings import ArithmeticTaskSettings, TextTaskSettings
from launch.errors import UserError
from launch.run_folder.task import EXAMPLES_FILE, check_examples
from tests.run_folders import write_metrics


def texts(folder: Path, content: str) -> TextTaskSettings:
    folder.mkdir(exist_ok=True)
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"{number} {content}", encoding="utf-8")
    files = tuple(str(path) for path in sorted(folder.iterdir()))
    return TextTaskSettings(dataset="files", files=files, prompt_tokens=4, target_tokens=4)


def test_a_data_set_that_was_replaced_is_refused_once_the_run_has_begun(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    check_examples(load_task(texts(tmp_path / "data", "to be or not to be")), run)
    check_examples(load_task(texts(tmp_path / "data", "to be or not to bee")), run)  # without a step nothing is lost
    noted = (run / EXAMPLES_FILE).read_bytes()
    write_metrics(run)
    check_examples(load_task(texts(tmp_path / "moved", "to be or not to bee")), run)
    with pytest.raises(UserError, match=r"training examples are not .* \d+ with hash \w{8} then, \d+ with .* now"):
        check_examples(load_task(texts(tmp_path / "data", "to bee or not to be")), run)
    assert (run / EXAMPLES_FILE).read_bytes() == noted


def test_the_fingerprint_sees_order_and_border_and_not_the_chunks(tmp_path: Path) -> None:
    task = load_task(ArithmeticTaskSettings(max_digits=1, train_questions=40, held_out_questions=4))
    found = []
    for number, train in enumerate([task.train, task.train.select(range(40)), task.train.select(range(39, -1, -1))]):
        (run := tmp_path / str(number)).mkdir()
        check_examples(task.__class__(**{**vars(task), "train": train}), run)
        found.append(json.loads((run / EXAMPLES_FILE).read_text())["training"]["hash"])
    assert found[0] == found[1] != found[2]
