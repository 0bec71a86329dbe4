"""The report, and the page of a comparison, in a real browser: they draw, answer to pointer and keyboard, fit a phone,
and nothing in them escapes.

Chromium is the system's (`make browser` installs it where that is possible) and is spoken to by a pipe; it listens
nowhere and loads nothing but the file.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from buffer.experts.tasks import load_task
from buffer.reading.snapshot import read_buffer
from buffer.settings import ArithmeticTaskSettings
from launch.compare.results import render_page
from launch.report.command import write_report
from launch.report.document import MINUS
from launch.report.gather import Rollout, sample_rollouts
from launch.report.page import render
from tests.comparisons import OBJECTIVES, comparison_over_temperature, new_comparison
from tests.run_folders import finished_run, hostile_report

TIMEOUT_MS = 20_000
NAMES = ("chromium", "chromium-browser", "google-chrome")

BROKEN_IMAGES = "[...document.images].filter((image) => !image.complete || image.naturalWidth === 0).length"

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        missing = f"none of {', '.join(NAMES)} is installed: run `make browser` as root, or install Chromium yourself"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to be root inside its sandbox
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=executable, args=arguments, timeout=TIMEOUT_MS * 3)
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens a file, and fails at the end where the page complained of anything or asked for another file."""
    pages: list[Page] = []
    complaints: list[str] = []

    def open_(path: Path, **options: object) -> Page:
        page = browser.new_page(**options)
        page.set_default_timeout(TIMEOUT_MS)
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        page.on(
            "request", lambda request: request.url == path.as_uri() or complaints.append(f"asked for {request.url}")
        )
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield open_
    for page in pages:
        page.close()
    assert complaints == []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    task = load_task(ArithmeticTaskSettings(max_digits=1, train_questions=40, held_out_questions=4))
    folder = finished_run(tmp_path_factory.mktemp("runs") / "run", task)
    assert write_report(folder) == []
    return folder


@pytest.fixture(scope="module")
def rollouts(run: Path) -> list[Rollout]:
    """What the page has to show."""
    from launch.run_folder.task import load_run_tokenizer

    snapshot = read_buffer(run / "buffer")
    return sample_rollouts(snapshot, load_run_tokenizer(run, snapshot.contract))


def texts_after_each_action(rollout: Rollout) -> list[str]:
    """The answer before the first action, and after each."""
    stack: list[str] = []
    texts = [""]
    for action in rollout.actions:
        if action.kind == "backspace":
            stack.pop()
        elif action.kind == "write":
            stack.append(action.text)
        texts.append("".join(stack))
    return texts


def text_now(page: Page) -> str:
    return "".join(page.locator("#stepper-text span:not(.prompt):not(.gone)").all_text_contents())


def test_the_keyboard_steps_through_the_actions(open_page: Open, run: Path, rollouts: list[Rollout]) -> None:
    page = open_page(run / "report.html")
    stepper, said = page.locator("#stepper"), page.locator("#stepper-said")
    index = 3
    rollout = rollouts[index]
    assert "backspace" in [action.kind for action in rollout.actions]
    page.locator(f"[data-rollout='{index}']").click()
    for done, text in enumerate(texts_after_each_action(rollout)):
        assert text_now(page) == text
        if done > 0:
            action = rollout.actions[done - 1]
            assert said.inner_text().startswith(f"Action {done} of {len(rollout.actions)} ")
            assert f"log-probability {MINUS}1 nats, 37 %, weights v{action.version}" in said.inner_text()
        page.keyboard.press("ArrowRight")  # a click on a rollout leaves the keyboard with the stepper
    assert page.locator("[data-step=ArrowRight]").is_disabled()
    page.keyboard.press("ArrowLeft")
    assert text_now(page) == texts_after_each_action(rollout)[-2]
    page.keyboard.press("Home")
    assert text_now(page) == ""
    page.locator("[data-step=End]").click()
    assert text_now(page) == texts_after_each_action(rollout)[-1]
    stepper.press("ArrowDown")
    assert page.locator(f"[data-rollout='{index + 1}']").get_attribute("aria-pressed") == "true"
    assert page.locator("#stepper-text .prompt").inner_text() == rollouts[index + 1].prompt


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (1280, "dark")])
def test_every_plot_is_drawn_and_nothing_sticks_out_sideways(
    open_page: Open, run: Path, width: int, scheme: str
) -> None:
    page = open_page(run / "report.html", viewport={"width": width, "height": 800}, color_scheme=scheme)
    for summary in page.locator("summary").all():
        summary.click()
    assert page.locator("figure img").count() > 10
    assert page.evaluate(BROKEN_IMAGES) == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    light, *_ = re.findall(r"[\d.]+", page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (float(light) > 128) == (scheme == "light")


def test_what_a_model_wrote_is_shown_and_does_nothing(open_page: Open, tmp_path: Path) -> None:
    report = hostile_report(tmp_path / "run")
    (tmp_path / "page.html").write_text(render(report), encoding="utf-8")
    page = open_page(tmp_path / "page.html")
    page.locator("#stepper").press("End")
    assert page.locator("#stepper-text .gone.p0").inner_text() == report.rollouts[0].actions[0].text
    assert page.evaluate("window.broken") is None


def test_a_comparison_shows_its_objectives_over_temperature(open_page: Open, tmp_path: Path) -> None:
    folder = new_comparison(tmp_path, OBJECTIVES)
    (tmp_path / "compare.html").write_text(render_page(comparison_over_temperature(), folder), encoding="utf-8")
    page = open_page(tmp_path / "compare.html", viewport={"width": 360, "height": 800})
    assert page.locator("#temperature img").count() > 0
    assert page.evaluate(BROKEN_IMAGES) == 0
    for summary in page.locator("summary").all():
        summary.click()
    assert page.locator("#numbers").get_by_text("behavior_cloning").last.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
