"""The numbers of `evaluation.json` with their intervals, and what they say about editing.

The file is read by its own description, which leaves out what it does not know: a report of an older run, or of a newer
one, shows what it understands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, ValidationError

from launch.evaluation.report import EVALUATION_FILE
from launch.statistics import Difference, Estimate, difference

Direction = Literal["higher", "lower", "neither"]
Outcome = Literal["better", "worse"]


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
    """One checkpoint's number. change: against the baseline, None for itself and where nothing was measured."""

    number: Estimate | None
    change: Difference | None


@dataclass(frozen=True)
class Measure:
    """A row of the table: one number of every checkpoint."""

    group: str
    name: str
    info: MetricInfo
    cells: tuple[Cell, ...]


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


class EvaluationFile(BaseModel):
    """What a report reads of `evaluation.json`. baseline: the label that `differences` are against."""

    task: str
    num_examples: int
    seed: int
    checkpoints: list[_Checkpoint] = Field(min_length=1)
    baseline: str | None = None
    left_out: dict[str, str] = {}


@dataclass(frozen=True)
class EvaluationTable:
    """baseline: index of the checkpoint that the others are set against."""

    file: EvaluationFile
    baseline: int
    measures: tuple[Measure, ...]

    @property
    def labels(self) -> list[str]:
        """Of the checkpoints, in the order of the cells."""
        return [checkpoint.label for checkpoint in self.file.checkpoints]

    @property
    def findings(self) -> list[tuple[str, Measure, Cell]]:
        """What was compared, by the label of the checkpoint: headlines, or the first numbers where there are none."""
        headlines = [measure for measure in self.measures if measure.info.is_headline and measure.group in GROUPS]
        return [
            (label, measure, measure.cells[index])
            for index, label in enumerate(self.labels)
            for measure in headlines or self.measures[:3]
            if measure.cells[index].change
        ]


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
        file = EvaluationFile.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path} is no evaluation that this version can show: {where}: {first['msg']}") from None
    labels = [checkpoint.label for checkpoint in file.checkpoints]
    candidates = [index for index, label in enumerate(labels) if is_baseline(label)]
    named = [index for index, label in enumerate(labels) if label == file.baseline]
    baseline = [len(labels) - 1, *named, *candidates][-1]
    found = dict.fromkeys(
        (group, name) for each in file.checkpoints for group, names in each.metrics.items() for name in names
    )
    keys = sorted(found, key=lambda key: (_place(key[0], [*GROUPS]), _place(key[1], [*METRICS])))
    return EvaluationTable(file, baseline, tuple(_measure(file, baseline, *key) for key in keys))


def change_outcome(change: Difference | None, info: MetricInfo) -> Outcome | None:
    """What a difference means; None within noise, where that is unknown, and where no direction is better."""
    if change is None or change.within_noise is not False or info.better == "neither":
        return None
    return "better" if (change.value > 0.0) == (info.better == "higher") else "worse"


def _place(name: str, known: list[str]) -> int:
    return known.index(name) if name in known else len(known)


def _measure(file: EvaluationFile, baseline: int, group: str, name: str) -> Measure:
    numbers = [checkpoint.metrics.get(group, {}).get(name) for checkpoint in file.checkpoints]
    against = numbers[baseline]
    cells = []
    for index, number in enumerate(numbers):
        change = None
        if index != baseline and number is not None and against is not None:
            paired = _paired(file, index, baseline, group, name)
            change = difference(number.estimate, against.estimate, paired)
        cells.append(Cell(None if number is None else number.estimate, change))
    return Measure(group, name, METRICS.get(name, MetricInfo(name.replace("_", " "))), tuple(cells))


def _paired(file: EvaluationFile, index: int, baseline: int, group: str, name: str) -> Estimate | None:
    """The difference that was measured example by example, where the file has it: it knows what the two share."""
    ours, others = file.checkpoints[index], file.checkpoints[baseline]
    if file.baseline not in (ours.label, others.label):
        return None
    sign, holder = (1.0, ours) if others.label == file.baseline else (-1.0, others)
    number = holder.differences.get(group, {}).get(name)
    if number is None or number.value is None:
        return None
    return Estimate(sign * number.value, number.standard_error, number.n or 0)
