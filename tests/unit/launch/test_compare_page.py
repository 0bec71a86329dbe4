"""The page of a comparison: its verdicts, its curves over temperature, and whatever a label holds."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest

from launch.compare.page import render_page
from launch.compare.results import ComparedMetric
from launch.compare.temperatures import temperature_charts, temperature_of
from launch.statistics import Estimate, Spread
from tests.comparisons import (
    ARMS,
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
    found = comparison(3, ARMS[:3])
    estimates = {key: dict(numbers) for key, numbers in found.estimates.items()}
    for seed in range(3):
        estimates[ARMS[1], seed]["held_out.perplexity"] = Estimate(20.0 + 0.1 * seed**2, 0.1, 500)
        estimates[ARMS[0], seed]["held_out.perplexity"] = Estimate(15.0, 0.1, 500)
    html = render_page(replace(found, estimates=estimates), new_comparison(tmp_path, OBJECTIVES))
    verdict = section(html, "summary")
    # Differences of .10 .11 .09: ±.025 by Student's t with 2 degrees of freedom (4.303 x .01 / sqrt 3).
    assert f"{ARMS[1]} +10.0 points (7.5 to 12.5) better" in verdict
    assert re.search(rf"perplexity on held-out texts; mle: 15\.0 {ARMS[1]} \+5\.17 \(.*?\) worse", verdict)
    assert "sampled" not in verdict, "the length is no main number"
    assert "reference" in section(html, "headlines")
    assert "{name: sequencematch, alpha: 0.1, beta_steps: 50}" in section(html, "arms")


def test_without_a_difference_it_says_so_and_few_seeds_are_told(tmp_path: Path) -> None:
    one = comparison(1, ("mle", "emo"))
    estimates = {key: {"greedy.accuracy": Estimate(0.5, 0.02, 500)} for key in one.estimates}
    html = render_page(replace(one, estimates=estimates), new_comparison(tmp_path))
    assert "No arm differs from mle in a main number by more than noise" in section(html, "summary")
    assert "1 of the 3 seeds that it takes" in text_of(html)
    assert 'id="temperature"' not in html


def test_a_number_that_all_arms_share_is_drawn_in_the_middle(tmp_path: Path) -> None:
    one = comparison(1, ("mle", "emo"))
    estimates = {key: {"greedy.accuracy": Estimate(0.5, None, 500)} for key in one.estimates}
    html = render_page(replace(one, estimates=estimates), new_comparison(tmp_path))
    assert set(re.findall(r'class="dot" cx="([0-9.]+)"', html)) == {"76.0"}


def test_reports_of_runs_are_linked_where_there_are_any(tmp_path: Path) -> None:
    folder = new_comparison(tmp_path)
    report = folder.arm("emo", 1) / "report.html"
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
    charts = {chart.id: chart.data for chart in temperature_charts(found.arms, found.metrics())}
    assert list(charts) == ["temperature-mauve", "temperature-diversity", "trade-off"]
    _, cloning = charts["temperature-mauve"]["series"]
    assert cloning == {
        "name": "behaviour_cloning",
        "color": 1,
        "dash": 0,
        "x": sorted(TEMPERATURES),
        "y": [75.0, 67.5, 60.0],
        "low": [73.0, 65.5, 58.0],
        "high": [77.0, 69.5, 62.0],
    }
    (reference, _) = charts["trade-off"]["series"]
    assert reference["x"] == [63.0, 76.5, 90.0]
    assert reference["y"] == [65.0, 57.5, 50.0]
    html = render_page(found, new_comparison(tmp_path, OBJECTIVES))
    data = re.search(r'id="report-data">(.*?)</script>', html)
    assert data is not None
    assert json.loads(data.group(1))["charts"] == charts


def test_one_temperature_makes_no_curve() -> None:
    spread = Spread(0.5, None, 0.01, 1)
    metrics = [ComparedMetric(name, {"mle": spread}, {}) for name in ("sampled.mauve", "temperature=0.7.diversity")]
    assert temperature_charts(("mle",), metrics) == []
