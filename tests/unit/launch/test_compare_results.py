"""A comparison's table, its page, its files, and the folder that it lies in."""

from __future__ import annotations

import io
import json
import re
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from launch.compare.plan import read_plan
from launch.compare.results import Comparison, render_comparison, render_page, stage_cost, temperature_plot
from launch.compare.runs import ComparisonFolder
from launch.errors import UserError
from launch.evaluation.report import write_evaluation
from launch.evaluation.results import CheckpointResult, Evaluation, read_evaluation
from launch.settings.recipe import read_recipe
from launch.statistics import Estimate
from tests.comparisons import (
    COST,
    LABELS,
    OBJECTIVES,
    TEMPERATURES,
    comparison_of,
    comparison_over_temperature,
    estimates_of,
    new_comparison,
)


def shown(found: Comparison, width: int = 200) -> str:
    """As a terminal shows it."""
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(render_comparison(found))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("num_seeds", [1, 3])
@pytest.mark.parametrize("width", [80, 95, 200])
def test_every_objective_is_shown_and_no_number_is_cut(num_seeds: int, width: int) -> None:
    found = comparison_of(estimates_of(num_seeds))
    text = shown(found, width)
    assert "…" not in text
    assert all(label[:30] in text for label in LABELS), "a long label goes on in the next line"
    for metric in found.metrics():
        for label, each in metric.spreads.items():
            assert f"{each.mean:.3f}"[1:] in text or f"{each.mean:.2f}" in text, (metric.name, label)


def test_numbers_differences_and_marks() -> None:
    text = shown(comparison_of(estimates_of(3, LABELS[:2])))
    assert "arithmetic: 3 seeds of each objective, 400 steps" in text
    assert ".310 ±.010 (.020)" in text  # .30 .31 .32
    assert "+.100 ±.025 ≠" in text  # differences .10 .11 .09: their deviation .01 / sqrt 3 times t = 4.303
    assert "100,000" in text
    assert "Student's t" in text


def test_few_seeds_are_named() -> None:
    text = shown(comparison_of(estimates_of(2, LABELS[:2])))
    assert "The spread over seeds is unknown: it needs 3 seeds, and there are 2" in text
    assert "12.50 (0.25)" in text
    assert "+0.00 ±0.49 ≈" in text
    assert "Student" not in text


def test_files_hold_every_run_and_say_what_failed(tmp_path: Path) -> None:
    estimates = estimates_of(3, LABELS[:3])
    del estimates[LABELS[1], 2]
    failed = comparison_of(estimates, **{"x-behavior_cloning-seed2": "it died"})
    tree = json.loads(failed.to_json())
    assert [(run["objective"], run["seed"]) for run in tree["runs"]] == list(estimates)
    assert {name: tree["runs"][0][name] for name in COST} == COST
    assert tree["budget"] == "400 steps"
    (accuracy, *_) = tree["metrics"]
    assert accuracy["name"] == "greedy.accuracy"
    assert accuracy["objectives"]["mle"].keys() == {"mean", "deviation", "standard_error", "num_seeds"}
    assert accuracy["differences"][LABELS[1]]["num_seeds"] == 2
    assert accuracy["differences"][LABELS[1]]["basis"] == "examples"
    assert accuracy["differences"][LABELS[2]]["within_noise"] is False
    assert "x-behavior_cloning-seed2 failed: it died" in render_page(failed, new_comparison(tmp_path, OBJECTIVES))
    assert "x-behavior_cloning-seed2 failed: it died" in shown(failed)
    assert "†" in shown(failed), "two of three seeds: of the examples alone"


def test_a_run_has_its_start_by_links_that_move_with_the_folder(tmp_path: Path) -> None:
    made = new_comparison(tmp_path / "runs")
    checkpoint = made.start(0) / "checkpoints" / "pretrain" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "progress.json").write_text("{}")
    for _ in range(2):  # a second time it is there already
        made.open_run(made.run("mle", 0), made.plan.run_settings("mle", 0), made.start(0))
    moved = tmp_path / "moved" / "pair"
    shutil.move(tmp_path / "runs", tmp_path / "moved")
    opened = ComparisonFolder(moved, read_plan(moved))
    assert opened.plan == made.plan
    assert (opened.run("mle", 0) / "checkpoints" / "pretrain" / "step-000001" / "progress.json").read_text() == "{}"


def test_a_run_whose_making_was_cut_short_is_made_anew(tmp_path: Path) -> None:
    made = new_comparison(tmp_path)
    settings = made.plan.run_settings("mle", 0)
    run = made.run("mle", 0)
    assert not made.is_finished(run, settings)
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("na")
    made.open_run(run, settings, None)
    assert read_recipe(run / "config.yaml") == settings.model_copy(update={"runs_folder": str(run.parent)})
    assert not made.is_finished(run, settings)


def test_a_comparison_is_not_begun_twice(tmp_path: Path) -> None:
    new_comparison(tmp_path)
    with pytest.raises(UserError, match=r"--resume .*pair"):
        new_comparison(tmp_path)


def test_the_cost_of_a_stage_counts_repeated_steps_once(tmp_path: Path) -> None:
    rows = [
        ("pretrain", 1, 9.0),
        ("compared", 1, 2.0),
        ("compared", 2, 2.0),
        ("compared", 2, 0.5),
        ("compared", 3, 1.0),
    ]
    lines = [
        json.dumps({"time": 0.0, "stage": stage, "step": step, "step_s": seconds, "actions_per_s": 100 / seconds})
        for stage, step, seconds in rows
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert stage_cost(tmp_path) == {"steps": 3, "actions": 300, "seconds": 3.5}


def test_what_an_evaluation_wrote_is_read_back(tmp_path: Path) -> None:
    nothing = Estimate(None, None, 0)
    results = [
        CheckpointResult(
            label, Path("a"), {"greedy": {"accuracy": Estimate.fraction(cases)}, "recovery": {"r": nothing}}
        )
        for label, cases in (
            ("mle", np.array([True, False, False, True])),
            ("emo", np.array([True, False, True, True])),
        )
    ]
    written = Evaluation.of("arithmetic", 4, 0, results, {"max_actions": 9}, {"mauve": "not asked for"})
    write_evaluation(written, tmp_path)
    found = read_evaluation(tmp_path)
    assert found == written
    assert found is not None
    first, second = found.checkpoints
    assert (first.metrics["recovery"]["r"], first.differences) == (nothing, {})
    change = second.differences["greedy"]["accuracy"]
    # One of four answers differs, so the differences are 0, 0, 1, 0: their deviation 1/2, over the root of 4.
    assert (change.value, change.standard_error, change.within_noise) == (0.25, pytest.approx(0.25), True)


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
    assert re.findall(r'href="(objectives[^"]*)"', html) == ["objectives/pair-emo-seed1/report.html"]
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)" in html


def test_curves_over_temperature(tmp_path: Path) -> None:
    found = comparison_over_temperature()
    plot = temperature_plot(found.objectives, found.metrics())
    assert plot is not None
    cloning = plot.series[1]
    assert (plot.title, cloning.name) == ("MAUVE over temperature", "behavior_cloning")
    assert cloning.x == sorted(TEMPERATURES)
    assert cloning.y == pytest.approx([75.0, 67.5, 60.0])
    assert (cloning.low, cloning.high) == (pytest.approx([73.0, 65.5, 58.0]), pytest.approx([77.0, 69.5, 62.0]))
    html = render_page(found, new_comparison(tmp_path, OBJECTIVES))
    assert "MAUVE over temperature" in section(html, "temperature")
    one = comparison_of({("mle", 0): {"sampled.mauve": Estimate(0.5, 0.01, 9), "temperature=0.7.x": Estimate(1, 0, 9)}})
    assert temperature_plot(one.objectives, one.metrics()) is None
