"""The numbers of an evaluation with their intervals, and the verdict on deletions."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from launch.evaluation.results import CheckpointResult, Evaluation, read_evaluation
from launch.statistics import Difference, Estimate, difference

Direction = Literal["higher", "lower", "neither"]
Outcome = Literal["better", "worse"]


@dataclass(frozen=True)
class MetricInfo:
    """How a number is shown. better: the direction that a user wants. is_headline: it is a part of the verdict."""

    title: str
    better: Direction = "neither"
    is_fraction: bool = False
    is_headline: bool = False


METRICS = {
    "accuracy": MetricInfo("right answers", "higher", is_fraction=True, is_headline=True),
    "recovery": MetricInfo("recovered", "higher", is_fraction=True, is_headline=True),
    "mauve": MetricInfo("MAUVE", "higher", is_fraction=True, is_headline=True),
    "perplexity": MetricInfo("perplexity", "lower", is_headline=True),
    "perplexity_without_backspace": MetricInfo("perplexity without backspace", "lower"),
    "backspace_prob": MetricInfo("probability of backspace before a right token", "lower", is_fraction=True),
    "diversity": MetricInfo("diversity (distinct 2- to 4-grams)", is_fraction=True),
    "self_bleu": MetricInfo("self-BLEU (100 % = all texts alike)", is_fraction=True),
    "forced_tokens_deleted": MetricInfo("forced tokens deleted", "higher", is_fraction=True),
    "wrong_tokens_deleted": MetricInfo("wrong tokens deleted", "higher", is_fraction=True),
    "correct_tokens_deleted": MetricInfo("correct tokens deleted", "lower", is_fraction=True),
    "backspace_rate": MetricInfo("backspaces among the actions", is_fraction=True),
    "actions_per_answer": MetricInfo("actions per answer"),
    "actions_per_final_token": MetricInfo("actions per final token"),
    "rewritten_rate": MetricInfo("deleted tokens written again at once", "lower", is_fraction=True),
    "longest_rewrite_run": MetricInfo("longest loop of rewrites", "lower"),
    "max_actions_rate": MetricInfo("stopped at the limit of actions", "lower", is_fraction=True),
    "empty_rate": MetricInfo("empty answers", "lower", is_fraction=True),
    "truncated_rate": MetricInfo("cut off by a limit", "lower", is_fraction=True),
    "tokens_per_text": MetricInfo("tokens per text"),
    "distinct_4grams": MetricInfo("distinct 4-grams", "neither", is_fraction=True),
}
"""Known metrics of `launch.evaluation`; others are shown by their name, as plain numbers."""


def metric_info(name: str) -> MetricInfo:
    """How a metric is shown."""
    return METRICS.get(name, MetricInfo(name.replace("_", " ")))


GROUPS = {
    "greedy": "greedy",
    "sampled": "sampled",
    "recovery": "after a forced wrong first token",
    "held_out": "on held-out texts",
}
"""Titles of the groups in the verdict; other groups are other decodings."""


class Cell(NamedTuple):
    """A number of one checkpoint. change: to the baseline; None for the baseline itself and without a measurement."""

    number: Estimate | None
    change: Difference | None


@dataclass(frozen=True)
class Measure:
    """A row of the table: one number of every checkpoint."""

    group: str
    name: str
    info: MetricInfo
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class EvaluationTable:
    """labels: of the checkpoints, in the order of the cells. baseline: index of the checkpoint that the others are
    compared with."""

    evaluation: Evaluation
    labels: list[str]
    baseline: int
    measures: list[Measure]

    @property
    def findings(self) -> list[tuple[str, Measure, Cell]]:
        """Label, number and change of every comparison: of headlines, or of the first numbers without any."""
        headlines = [measure for measure in self.measures if measure.info.is_headline and measure.group in GROUPS]
        return [
            (label, measure, measure.cells[index])
            for index, label in enumerate(self.labels)
            for measure in headlines or self.measures[:3]
            if measure.cells[index].change
        ]


def evaluation_table(run: Path, controls: Collection[str]) -> EvaluationTable | None:
    """The evaluation of a run as a table; None if there is none. ValueError, OSError: its file cannot be read.

    controls: labels of checkpoints to compare with; the last of them is the baseline, by default that of the file.
    """
    evaluation = read_evaluation(run)
    if evaluation is None:
        return None
    labels = [checkpoint.label for checkpoint in evaluation.checkpoints]
    baseline = labels.index([evaluation.baseline, *filter(controls.__contains__, labels)][-1])
    found = dict.fromkeys(
        (group, name) for each in evaluation.checkpoints for group, names in each.metrics.items() for name in names
    )
    keys = sorted(found, key=lambda key: (_place(key[0], [*GROUPS]), _place(key[1], [*METRICS])))
    measures = [_measure(evaluation, evaluation.checkpoints[baseline], *key) for key in keys]
    return EvaluationTable(evaluation, labels, baseline, measures)


def change_outcome(change: Difference | None, info: MetricInfo) -> Outcome | None:
    """The meaning of a difference; None within noise, if that is unknown, and if no direction is better."""
    if change is None or change.within_noise is not False or info.better == "neither":
        return None
    return "better" if (change.value > 0.0) == (info.better == "higher") else "worse"


def _place(name: str, known: list[str]) -> int:
    return known.index(name) if name in known else len(known)


def _measure(evaluation: Evaluation, baseline: CheckpointResult, group: str, name: str) -> Measure:
    against = baseline.metrics.get(group, {}).get(name)
    cells = []
    for result in evaluation.checkpoints:
        number, change = result.metrics.get(group, {}).get(name), None
        if result is not baseline and number is not None and against is not None:
            change = difference(number, against, _paired(evaluation.baseline, result, baseline, group, name))
        cells.append(Cell(number, change))
    return Measure(group, name, metric_info(name), tuple(cells))


def _paired(reference: str, ours: CheckpointResult, other: CheckpointResult, group: str, name: str) -> Estimate | None:
    """`ours` - `other`, measured example by example, if one of them is the file's reference."""
    if other.label == reference:
        return ours.differences.get(group, {}).get(name)
    found = other.differences.get(group, {}).get(name) if ours.label == reference else None
    return None if found is None or found.value is None else replace(found, value=-found.value)
