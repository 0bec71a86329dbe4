"""The report, and the page of a comparison, in a real browser: they draw, answer to pointer and keyboard, fit a phone,
and nothing in them escapes.

Chromium is the system's (`make browser` installs it where that is possible) and is spoken to by a pipe; it listens
nowhere and loads nothing but the file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, sync_playwright

from buffer.experts.tasks import load_task
from buffer.reading.reader import read_buffer
from buffer.settings import ArithmeticTaskSettings
from launch.compare.page import render_page
from launch.report.command import write_report
from launch.report.formatting import MINUS
from launch.report.page import render
from launch.report.rollouts import Rollout, sample_rollouts
from tests.comparisons import OBJECTIVES, comparison_over_temperature, new_comparison
from tests.run_folders import finished_run, hostile_report

TIMEOUT_MS = 20_000
NAMES = ("chromium", "chromium-browser", "google-chrome")

CUT_TEXTS = """[...document.querySelectorAll("svg text")].filter((text) => {
    const own = text.getBoundingClientRect(), all = text.closest("svg").getBoundingClientRect();
    return own.left < all.left - 1 || own.right > all.right + 1;
}).map((text) => text.textContent)"""
"""Labels of plots that stick out of them."""

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        missing = (
            f"none of {', '.join(NAMES)} is installed: run `make browser` as root, or install your system's Chromium"
        )
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
    assert write_report(folder).notes == ()
    return folder


@pytest.fixture(scope="module")
def rollouts(run: Path) -> tuple[Rollout, ...]:
    """What the page has to show."""
    from launch.run_folder.tokenizer import load_run_tokenizer

    snapshot = read_buffer(run / "buffer")
    return sample_rollouts(snapshot, load_run_tokenizer(run, snapshot.contract)).rollouts


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


def plot_of(page: Page, title: str) -> Locator:
    return page.locator("#training figure", has=page.get_by_text(title, exact=True)).first


def test_every_plot_is_drawn_and_a_stage_comes_and_goes_by_a_click(open_page: Open, run: Path) -> None:
    page = open_page(run / "report.html")
    for summary in page.locator("summary").all():
        summary.click()
    for figure in page.locator("[data-plot]").all():
        assert figure.locator("svg .curve path, svg .bars path").count() > 0, figure.inner_text()
    buttons = page.locator("#stages button")
    assert [text.strip() for text in buttons.all_text_contents()] == ["sequencematch", "mle_control"]
    curves = plot_of(page, "Loss").locator(".curve")
    assert [curve.is_visible() for curve in curves.all()] == [True, True]
    buttons.last.click()
    assert buttons.last.get_attribute("aria-pressed") == "false"
    assert [curve.is_visible() for curve in curves.all()] == [True, False]
    buttons.last.click()
    assert [curve.is_visible() for curve in curves.all()] == [True, True]


def test_the_keyboard_steps_through_the_actions(open_page: Open, run: Path, rollouts: tuple[Rollout, ...]) -> None:
    page = open_page(run / "report.html")
    stepper, said = page.locator("#stepper"), page.locator("#stepper-said")
    index = next(index for index, rollout in enumerate(rollouts) if rollout.takes_back)
    assert "takes back “" in said.inner_text(), "the page opens where a token is taken back"
    page.locator(f"[data-rollout='{index}']").click()
    rollout = rollouts[index]
    for done, text in enumerate(texts_after_each_action(rollout)):
        assert text_now(page) == text
        if done > 0:
            action = rollout.actions[done - 1]
            assert said.inner_text().startswith(f"Action {done} of {len(rollout.actions)} ")
            assert f"log-probability {MINUS}1 nats, 37 %, weights v{action.version}" in said.inner_text()
        page.keyboard.press("ArrowRight")  # a click on a rollout leaves the keyboard with the stepper
    assert page.locator("[data-step=on]").is_disabled()
    page.keyboard.press("ArrowLeft")
    assert text_now(page) == texts_after_each_action(rollout)[-2]
    page.keyboard.press("Home")
    assert text_now(page) == ""
    page.locator("[data-step=last]").click()
    assert text_now(page) == texts_after_each_action(rollout)[-1]
    stepper.press("ArrowDown")
    assert page.locator(f"[data-rollout='{index + 1}']").get_attribute("aria-pressed") == "true"
    assert page.locator("#stepper-text .prompt").inner_text() == rollouts[index + 1].prompt
    page.locator("#stepper-strip button").nth(1).click()
    assert text_now(page) == texts_after_each_action(rollouts[index + 1])[2]


def test_a_plot_tells_its_numbers_to_pointer_and_keyboard(open_page: Open, run: Path) -> None:
    page = open_page(run / "report.html")
    figure = plot_of(page, "Loss")
    plot, tip = figure.locator(".drawing"), figure.locator(".tip")
    assert not tip.is_visible()
    box = plot.bounding_box()
    assert box is not None
    plot.hover(position={"x": box["width"] - 2, "y": box["height"] / 2})
    assert tip.inner_text().splitlines() == ["step 40", "sequencematch: 0.125", "mle_control: 0.125"]
    plot.focus()
    page.mouse.move(0, 0)
    plot.press("ArrowRight")
    assert tip.inner_text().splitlines()[0] == "step 1"
    bars = page.locator("#machinery figure", has=page.get_by_text("Staleness", exact=True))
    bars.locator(".drawing").hover()
    assert "publications" in bars.locator(".tip").inner_text()


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_sticks_out_sideways(open_page: Open, run: Path, width: int) -> None:
    page = open_page(run / "report.html", viewport={"width": width, "height": 800})
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CUT_TEXTS) == []


def test_the_page_follows_the_reader_into_the_dark(open_page: Open, run: Path) -> None:
    colors = [
        open_page(run / "report.html", color_scheme=scheme).evaluate("getComputedStyle(document.body).backgroundColor")
        for scheme in ("light", "dark")
    ]
    assert colors[0] != colors[1]


def test_what_a_model_wrote_is_shown_and_does_nothing(open_page: Open, tmp_path: Path) -> None:
    report = hostile_report(tmp_path / "run")
    assert report.rollouts is not None
    (tmp_path / "page.html").write_text(render(report), encoding="utf-8")
    page = open_page(tmp_path / "page.html")
    page.locator("#stepper").press("End")
    assert page.locator("#stepper-text .gone").inner_text() == report.rollouts.rollouts[0].actions[0].text
    assert page.evaluate("window.broken") is None


def test_a_comparison_shows_its_objectives_over_temperature(open_page: Open, tmp_path: Path) -> None:
    folder = new_comparison(tmp_path, OBJECTIVES)
    (tmp_path / "compare.html").write_text(render_page(comparison_over_temperature(), folder), encoding="utf-8")
    page = open_page(tmp_path / "compare.html", viewport={"width": 360, "height": 800})
    drawing = page.locator("#temperature .drawing").first
    assert drawing.locator(".curve").count() == 2
    drawing.press("ArrowRight")
    lines = drawing.locator(".tip").inner_text().splitlines()
    assert lines == ["temperature 0.7", "mle: 65 (63 to 67)", "behaviour_cloning: 75 (73 to 77)"]
    for summary in page.locator("summary").all():
        summary.click()
    assert page.locator("#numbers").get_by_text("behaviour_cloning").last.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate(CUT_TEXTS) == []
