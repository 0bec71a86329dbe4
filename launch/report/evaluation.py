"""The numbers of `evaluation.json` with their intervals, and what they say about editing.

The file is read by its own description, which leaves out what it does not know: a report of an older run, or of a newer
one, shows what it understands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, ValidationError

from launch.evaluation.report import EVALUATION_FILE
from launch.statistics import Difference, Estimate, Interval, difference

Direction = Literal["higher", "lower", "neither"]
Outcome = Literal["better", "worse"]


class _Number(BaseModel):
    value: float | None
    standard_error: float | None = None
    n: int | None = None

    @property
    def estimate(self) -> Estimate:
        return Estimate(self.value, self.standard_error, self.n or 0)


class _Checkpoint(BaseModel):
    label: str
    metrics: dict[str, dict[str, _Number]]
    differences: dict[str, dict[str, _Number]] = {}


class _EvaluationFile(BaseModel):
    task: str
    num_examples: int
    seed: int
    checkpoints: list[_Checkpoint] = Field(min_length=1)
    baseline: str | None = None
    left_out: dict[str, str] = {}


@dataclass(frozen=True)
class MetricInfo:
    """How a number is shown. better: the direction that a user wants; is_headline: it can carry the verdict."""

    title: str
    better: Direction = "neither"
    is_share: bool = False
    is_headline: bool = False


METRICS = {
    "accuracy": MetricInfo("right answers", "higher", is_share=True, is_headline=True),
    "recovery": MetricInfo("recovered", "higher", is_share=True, is_headline=True),
    "mauve": MetricInfo("MAUVE", "higher", is_share=True, is_headline=True),
    "perplexity": MetricInfo("perplexity", "lower", is_headline=True),
    "perplexity_without_backspace": MetricInfo("perplexity without what backspace gets", "lower"),
    "backspace_prob": MetricInfo("probability of backspace before a right token", "lower", is_share=True),
    "diversity": MetricInfo("diversity (distinct 2- to 4-grams)", is_share=True),
    "self_bleu": MetricInfo("self-BLEU (100 % = all texts alike)", is_share=True),
    "planted_taken_back": MetricInfo("planted tokens taken back", "higher", is_share=True),
    "wrong_taken_back": MetricInfo("wrong tokens taken back", "higher", is_share=True),
    "right_taken_back": MetricInfo("right tokens taken back", "lower", is_share=True),
    "backspace_rate": MetricInfo("backspaces among the actions", is_share=True),
    "actions_per_answer": MetricInfo("actions per answer"),
    "actions_per_final_token": MetricInfo("actions per final token"),
    "rewritten_rate": MetricInfo("deleted tokens written again at once", "lower", is_share=True),
    "longest_rewrite_run": MetricInfo("longest loop of rewrites", "lower"),
    "max_actions_rate": MetricInfo("stopped by the bound on actions", "lower", is_share=True),
    "empty_rate": MetricInfo("empty answers", "lower", is_share=True),
    "truncated_rate": MetricInfo("cut off by a limit", "lower", is_share=True),
    "tokens_per_text": MetricInfo("tokens per text"),
    "distinct_4grams": MetricInfo("distinct 4-grams", "neither", is_share=True),
}
"""What is known of a metric of `launch.evaluation`; others are shown by their name, as plain numbers."""

GROUPS = {
    "greedy": "greedy",
    "sampled": "sampled",
    "recovery": "after a planted wrong first token",
    "held_out": "on held-out texts",
}
"""Titles of the groups that the verdict is made of; others are further ways of decoding."""


@dataclass(frozen=True)
class Cell:
    """One checkpoint's number. change: against the baseline, None for itself and where nothing was measured. outcome:
    None within noise, and where that is unknown.
    """

    interval: Interval | None
    count: int | None
    change: Difference | None
    outcome: Outcome | None


@dataclass(frozen=True)
class Measure:
    """A row of the table: one number of every checkpoint. span: ends of the axis that its intervals are drawn on."""

    group: str
    name: str
    info: MetricInfo
    cells: tuple[Cell, ...]
    span: tuple[float, float]


@dataclass(frozen=True)
class Finding:
    """One sentence of the verdict: the number of a checkpoint, and that of the baseline."""

    label: str
    measure: Measure
    cell: Cell
    against: Interval


@dataclass(frozen=True)
class EvaluationTable:
    """labels: of the checkpoints, in the order of the cells. baseline: index of the one that others are set against.
    left_out: what was not measured, and why.
    """

    task: str
    num_examples: int
    seed: int
    labels: tuple[str, ...]
    baseline: int
    measures: tuple[Measure, ...]
    findings: tuple[Finding, ...]
    left_out: dict[str, str]


def read_evaluation(run: Path, is_baseline: Callable[[str], bool]) -> EvaluationTable | None:
    """The evaluation of a run, None where there is none.

    is_baseline: whether a checkpoint of that label is what editing is compared with; the last such one is. Where there
        is none, it is the baseline of the file itself, or the last checkpoint.

    Raises:
        ValueError: the file is no evaluation. OSError: it cannot be read.
    """
    path = run / EVALUATION_FILE
    if not path.is_file():
        return None
    try:
        file = _EvaluationFile.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path} is no evaluation that this version can show: {where}: {first['msg']}") from None
    labels = tuple(checkpoint.label for checkpoint in file.checkpoints)
    candidates = [index for index, label in enumerate(labels) if is_baseline(label)]
    named = [index for index, label in enumerate(labels) if label == file.baseline]
    baseline = [len(labels) - 1, *named, *candidates][-1]
    measures = tuple(_measure(file, baseline, group, name) for group, name in _names(file.checkpoints))
    findings = _findings(labels, baseline, measures)
    return EvaluationTable(file.task, file.num_examples, file.seed, labels, baseline, measures, findings, file.left_out)


def change_outcome(change: Difference | None, info: MetricInfo) -> Outcome | None:
    """What a difference means; None within noise, where that is unknown, and where no direction is better."""
    if change is None or change.within_noise is not False or info.better == "neither":
        return None
    return "better" if (change.value > 0.0) == (info.better == "higher") else "worse"


def _names(checkpoints: Sequence[_Checkpoint]) -> list[tuple[str, str]]:
    """(group, metric) in the order of the tables above; what they do not know follows in its own order."""
    found = dict.fromkeys(
        (group, name) for checkpoint in checkpoints for group, names in checkpoint.metrics.items() for name in names
    )
    groups, metrics = [*GROUPS], [*METRICS]
    return sorted(
        found,
        key=lambda key: (
            groups.index(key[0]) if key[0] in GROUPS else len(groups),
            metrics.index(key[1]) if key[1] in METRICS else len(metrics),
        ),
    )


def _measure(file: _EvaluationFile, baseline: int, group: str, name: str) -> Measure:
    info = METRICS.get(name, MetricInfo(name.replace("_", " ")))
    numbers = [checkpoint.metrics.get(group, {}).get(name) for checkpoint in file.checkpoints]
    intervals = [None if number is None else number.estimate.interval() for number in numbers]
    against = numbers[baseline]
    cells = []
    for index, (number, interval) in enumerate(zip(numbers, intervals, strict=True)):
        change = None
        if index != baseline and number is not None and against is not None:
            change = difference(number.estimate, against.estimate, _paired(file, index, baseline, group, name))
        cells.append(Cell(interval, None if number is None else number.n, change, change_outcome(change, info)))
    return Measure(group, name, info, tuple(cells), _span(intervals, info))


def _paired(file: _EvaluationFile, index: int, baseline: int, group: str, name: str) -> Estimate | None:
    """The difference that was measured example by example, where the file has it: it knows what the two share."""
    ours, others = file.checkpoints[index], file.checkpoints[baseline]
    sign, holder = (1.0, ours) if others.label == file.baseline else (-1.0, others)
    if file.baseline not in (ours.label, others.label):
        return None
    number = holder.differences.get(group, {}).get(name)
    if number is None or number.value is None:
        return None
    return Estimate(sign * number.value, number.standard_error, number.n or 0)


def _span(intervals: Sequence[Interval | None], info: MetricInfo) -> tuple[float, float]:
    if info.is_share:
        return 0.0, 1.0
    ends = [end for known in intervals if known is not None for end in (known.value, known.low, known.high)]
    numbers = [end for end in ends if end is not None]
    return (min(0.0, *numbers), max(*numbers, 0.0) or 1.0) if numbers else (0.0, 1.0)


def _findings(labels: Sequence[str], baseline: int, measures: Sequence[Measure]) -> tuple[Finding, ...]:
    """Of the headline numbers, or of the first ones where there are none of those."""
    headlines = [measure for measure in measures if measure.info.is_headline and measure.group in GROUPS]
    return tuple(
        Finding(label, measure, measure.cells[index], against)
        for index, label in enumerate(labels)
        for measure in headlines or measures[:3]
        if measure.cells[index].change and (against := measure.cells[baseline].interval)
    )
