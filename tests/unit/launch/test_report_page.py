"""The page as a file: self-contained, safe whatever a model wrote, whole or not there; errors in one line."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli import app
from launch.errors import UserError
from launch.report import document
from launch.report.command import REPORT_FILE, write_report
from launch.report.document import MINUS
from launch.report.evaluation import MetricInfo
from launch.report.gather import gather
from launch.report.page import render
from launch.statistics import Interval
from tests.run_folders import HOSTILE, STEPS, hostile_report, new_run, write_log, write_metrics

SIZE_LIMIT_BYTES = 2_000_000


class Page(HTMLParser):
    """Elements with their attributes, and the text of some of them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {"script": [], "style": []}
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in self.texts:
            self.texts[self._inside].append(data)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose stages learned from data alone: without a buffer."""
    folder = new_run(tmp_path / "run")
    write_metrics(folder)
    return folder


def refusal(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["report", *arguments])
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    return line.removeprefix("error: ")


def test_what_a_model_wrote_stays_text(tmp_path: Path) -> None:
    page = Page(render(hostile_report(tmp_path / "run")))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2, "the data and our script"
    assert all((given["src"] or "").startswith("data:") for tag, given in page.elements if tag == "img")
    data = json.loads(page.texts["script"][0])
    assert (data[0][0], data[0][1][0][1]) == (HOSTILE, HOSTILE)


def test_nothing_is_loaded_and_only_our_script_and_style_may_act(run: Path) -> None:
    page = Page(render(gather(run)))
    (policy,) = (given["content"] for tag, given in page.elements if tag == "meta" and "http-equiv" in given)
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    for text in (page.texts["style"][0], page.texts["script"][1]):
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy
    references = [given.get("src") or given.get("href") for _, given in page.elements if {"src", "href"} & given.keys()]
    assert all(reference is None or reference.startswith("data:") for reference in references)
    assert not [given for _, given in page.elements if any(name == "style" or name.startswith("on") for name in given)]


def test_a_long_run_of_many_metrics_makes_a_page_of_usual_size(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    lines = []
    for stage in STEPS:
        for step in range(1, 1_001):
            row = {f"metric_{number}": (0.37 * step + number) % 1.7 for number in range(60)}
            lines.append(json.dumps({"time": step, "stage": stage, "step": step} | row))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert len(render(gather(run)).encode()) < SIZE_LIMIT_BYTES


def test_a_page_is_replaced_as_a_whole(run: Path) -> None:
    assert write_report(run) == []
    before = (run / REPORT_FILE).read_text()
    (run / "metrics.jsonl").write_text("damaged\n")
    with pytest.raises(UserError, match="cannot be read"):
        write_report(run)
    assert (run / REPORT_FILE).read_text() == before
    assert not list(run.glob("*.tmp"))


def test_a_part_that_cannot_be_read_is_told_and_the_rest_shown(run: Path) -> None:
    write_log(run)
    shutil.copy(run / "config.yaml", run / "evaluation.json")
    (run / "buffer" / "shard-000").mkdir(parents=True)
    result = CliRunner().invoke(app, ["report", str(run), "--output", str(run / "page.html")])
    assert (result.exit_code, result.stdout) == (0, f"report: {run / 'page.html'}\n"), result.output
    evaluation, buffer = result.stderr.splitlines()
    assert evaluation.startswith("warning: The evaluation cannot be shown: ")
    assert buffer.startswith("warning: The replay buffer cannot be shown: ")
    assert "The replay buffer cannot be shown" in (run / "page.html").read_text()


def test_what_cannot_be_reported_is_said_in_one_line(tmp_path: Path) -> None:
    assert "is not a run folder: it has no config.yaml" in refusal(str(tmp_path))
    run = new_run(tmp_path / "run")
    assert "has no data yet" in refusal(str(run))
    write_metrics(run, {"pretrain": 1})
    no_folder = run / "config.yaml"
    assert f"folder {no_folder} cannot be written" in refusal(str(run), "--output", str(no_folder / "page.html"))


def test_numbers_have_three_digits_and_differences_signs_and_units() -> None:
    numbers = [document.number(value) for value in (0.0, 0.12345, -1.5, 1234.5, 3e-7)]
    assert numbers == ["0", "0.123", f"{MINUS}1.50", "1,234", f"3.00e{MINUS}07"]
    share = MetricInfo("share", is_fraction=True)
    assert document.change(Interval(0.756, 0.7, 0.8), share) == "+75.6 points"
    assert document.change(Interval(-0.01, None, None), share) == f"{MINUS}1.0 points"
    assert document.interval_ends(Interval(0.5, 0.4, 0.6), share) == "40.0 to 60.0"
