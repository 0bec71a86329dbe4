"""The page of a comparison: its verdicts, its curves over temperature, and whatever a label holds."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest

from launch.compare.page import render_page
from launch.compare.results import ComparedMetric
from launch.compare.temperatures import temperature_of, temperature_plots
from launch.statistics import Estimate, Spread
from tests.comparisons import (
    LABELS,
    OBJECTIVES,
    TEMPERATURES,
    comparison,
    comparison_over_temperature,
    new_comparison,
)


def text_of(html: str) -> str:
    """What a reader sees, in one line."""
    body = re.sub(r"<(script|style).*?</\1>|<[^>]+>", " ", html[html.index("<body>") :], flags=re.DOTALL)
    return " ".join(unescape(body).split())


def section(html: str, id_: str) -> str:
    found = re.search(rf'<section id="{id_}">.*?</section>\s*(?=<section id=|<footer)', html, flags=re.DOTALL)
    assert found is not None
    return text_of(f"<body>{found.group()}")


def test_the_verdict_names_what_is_beyond_noise_and_which_way(tmp_path: Path) -> None:
    found = comparison(3, LABELS[:3])
    estimates = {key: dict(numbers) for key, numbers in found.estimates.items()}
    for seed in range(3):
        estimates[LABELS[1], seed]["held_out.perplexity"] = Estimate(20.0 + 0.1 * seed**2, 0.1, 500)
        estimates[LABELS[0], seed]["held_out.perplexity"] = Estimate(15.0, 0.1, 500)
    html = render_page(replace(found, estimates=estimates), new_comparison(tmp_path, OBJECTIVES))
    verdict = section(html, "summary")
    # Differences of .10 .11 .09: ±.025 by Student's t with 2 degrees of freedom (4.303 x .01 / sqrt 3).
    assert re.search(rf"{LABELS[1]} .*? \+10\.0 points \(7\.5 to 12\.5\) ≠ better", verdict)
    assert re.search(rf"perplexity .*?; mle: 15\.0 {LABELS[1]} 20\.2 .*?\+5\.17 \(.*?\) ≠ worse", verdict)
    assert "sampled" not in verdict, "the length is no main number"
    assert "reference" in section(html, "headlines")
    assert "{name: sequencematch, alpha: 0.1, beta_steps: 50}" in section(html, "objectives")


def test_without_a_difference_it_says_so_and_few_seeds_are_named(tmp_path: Path) -> None:
    one = comparison(1, ("mle", "emo"))
    estimates = {key: {"greedy.accuracy": Estimate(0.5, 0.02, 500)} for key in one.estimates}
    html = render_page(replace(one, estimates=estimates), new_comparison(tmp_path))
    assert "No objective differs from mle in a main number by more than noise" in section(html, "summary")
    assert "1 of the 3 seeds that it takes" in text_of(html)
    assert 'id="temperature"' not in html


def test_reports_of_runs_are_linked_where_there_are_any(tmp_path: Path) -> None:
    folder = new_comparison(tmp_path)
    report = folder.run("emo", 1) / "report.html"
    report.parent.mkdir(parents=True)
    report.write_text("")
    html = render_page(comparison(3, ("mle", "emo")), folder)
    assert re.findall(r'href="(arms[^"]*)">(\d+)<', html) == [("arms/pair-emo-seed1/report.html", "1")]


def test_what_went_wrong_stays_text(tmp_path: Path) -> None:
    found = replace(comparison(1, ("mle", "emo")), failures={"run": "<script>alert(1)</script>"})
    html = render_page(found, new_comparison(tmp_path))
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


def test_curves_over_temperature_and_the_price_in_diversity(tmp_path: Path) -> None:
    found = comparison_over_temperature()
    mauve, _, trade_off = temperature_plots(found.objectives, found.metrics())
    cloning = mauve.series[1]
    assert (mauve.title, cloning.name) == ("MAUVE over temperature", "behaviour_cloning")
    assert cloning.x == sorted(TEMPERATURES)
    assert cloning.y == pytest.approx([75.0, 67.5, 60.0])
    assert (cloning.low, cloning.high) == (pytest.approx([73.0, 65.5, 58.0]), pytest.approx([77.0, 69.5, 62.0]))
    reference = trade_off.series[0]
    assert (reference.x, reference.y) == (pytest.approx([63.0, 76.5, 90.0]), pytest.approx([65.0, 57.5, 50.0]))
    html = render_page(found, new_comparison(tmp_path, OBJECTIVES))
    shown = section(html, "temperature")
    assert "MAUVE over temperature" in shown
    assert "MAUVE against diversity" in shown
    assert html.count("<svg") == 3


def test_one_temperature_makes_no_curve() -> None:
    spread = Spread(0.5, None, 0.01, 1)
    metrics = [
        ComparedMetric(name, {"mle": (0.5,)}, {"mle": spread}, {})
        for name in ("sampled.mauve", "temperature=0.7.diversity")
    ]
    assert temperature_plots(("mle",), metrics) == []
