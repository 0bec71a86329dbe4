"""The page of a comparison: its verdicts, its curves over temperature, and whatever a label holds."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest

from launch.compare.show import render_page, temperature_of, temperature_plot
from launch.statistics import Estimate
from tests.comparisons import (
    LABELS,
    OBJECTIVES,
    TEMPERATURES,
    comparison_of,
    comparison_over_temperature,
    estimates_of,
    new_comparison,
)


def section(html: str, id_: str) -> str:
    """What a reader sees of it, in one line."""
    found = re.search(rf'<section id="{id_}">.*?</section>\s*(?=<section id=|<footer)', html, flags=re.DOTALL)
    assert found is not None
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", found.group())).split())


def test_the_verdict_names_what_is_beyond_noise_and_which_way(tmp_path: Path) -> None:
    estimates = estimates_of(3, LABELS[:3])
    for seed in range(3):
        estimates[LABELS[1], seed]["held_out.perplexity"] = Estimate(20.0 + 0.1 * seed**2, 0.1, 500)
        estimates[LABELS[0], seed]["held_out.perplexity"] = Estimate(15.0, 0.1, 500)
    html = render_page(comparison_of(estimates), new_comparison(tmp_path, OBJECTIVES))
    verdict = section(html, "summary")
    # Differences of .10 .11 .09: ±.025 by Student's t with 2 degrees of freedom (4.303 x .01 / sqrt 3).
    assert re.search(rf"{LABELS[1]} .*? \+10\.0 points \(7\.5 to 12\.5\) ≠ better", verdict)
    assert re.search(rf"perplexity .*? {LABELS[1]} 20\.2 .*?\+5\.17 \(.*?\) ≠ worse", verdict)
    assert "sampled" not in verdict, "the length is no main number"
    assert "reference" in section(html, "numbers")


def test_without_a_difference_it_says_so_and_few_seeds_are_named(tmp_path: Path) -> None:
    estimates = {(label, 0): {"greedy.accuracy": Estimate(0.5, 0.02, 500)} for label in ("mle", "emo")}
    html = render_page(comparison_of(estimates), new_comparison(tmp_path))
    assert "No objective differs from mle in a main number by more than noise" in section(html, "summary")
    assert "1 of the 3 seeds that it takes" in html
    assert 'id="temperature"' not in html


def test_reports_are_linked_and_what_went_wrong_stays_text(tmp_path: Path) -> None:
    folder = new_comparison(tmp_path)
    report = folder.run("emo", 1) / "report.html"
    report.parent.mkdir(parents=True)
    report.write_text("")
    html = render_page(comparison_of(estimates_of(3, ("mle", "emo")), run="<script>alert(1)</script>"), folder)
    assert re.findall(r'href="(arms[^"]*)"', html) == ["arms/pair-emo-seed1/report.html"]
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)" in html


@pytest.mark.parametrize(
    ("group", "temperature"),
    [
        ("sampled", 1.0),
        ("temperature=0.85", 0.85),
        ("temperature=0.85, banned", None),
        ("sampled, banned", None),
        ("greedy", None),
        ("top_p=0.9", None),
    ],
)
def test_groups_that_differ_in_temperature_alone(group: str, temperature: float | None) -> None:
    assert temperature_of(group) == temperature


def test_curves_over_temperature(tmp_path: Path) -> None:
    found = comparison_over_temperature()
    plot = temperature_plot(found.objectives, found.metrics())
    assert plot is not None
    cloning = plot.series[1]
    assert (plot.title, cloning.name) == ("MAUVE over temperature", "behaviour_cloning")
    assert cloning.x == sorted(TEMPERATURES)
    assert cloning.y == pytest.approx([75.0, 67.5, 60.0])
    assert (cloning.low, cloning.high) == (pytest.approx([73.0, 65.5, 58.0]), pytest.approx([77.0, 69.5, 62.0]))
    html = render_page(found, new_comparison(tmp_path, OBJECTIVES))
    assert "MAUVE over temperature" in section(html, "temperature")
    one = comparison_of({("mle", 0): {"sampled.mauve": Estimate(0.5, 0.01, 9), "temperature=0.7.x": Estimate(1, 0, 9)}})
    assert temperature_plot(one.objectives, one.metrics()) is None
