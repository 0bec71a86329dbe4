"""What an evaluation found, in the form of `evaluation.json`, which the report, a comparison and an export read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError

from launch.rollout_view import RolloutView
from launch.statistics import Estimate, change_by_example, difference

EVALUATION_FILE = "evaluation.json"
EVALUATION_FOLDER = "evaluation"
"""Of a run: where evaluations of its checkpoints keep their rollouts."""
HELD_OUT = "held_out"
"""The group of numbers that are of the held-out texts themselves, not of rollouts."""

Metrics = Mapping[str, Mapping[str, Estimate]]
"""Group -> name -> number."""


class Target(NamedTuple):
    """A checkpoint to evaluate. label: its name in tables and files."""

    label: str
    checkpoint: Path


@dataclass(frozen=True)
class ShownRollout:
    """A rollout to look at. group: of rollouts; is_correct: None where nothing says so."""

    group: str
    view: RolloutView
    is_correct: bool | None


@dataclass(frozen=True)
class Change(Estimate):
    """A number minus the baseline's, with the error of the difference example by example."""

    within_noise: bool | None = None


@dataclass(frozen=True)
class CheckpointResult:
    """What was measured of one checkpoint. differences: to the baseline; the baseline itself has none."""

    label: str
    checkpoint: Path
    metrics: Metrics
    rollouts: Annotated[tuple[ShownRollout, ...], Field(exclude=True)] = ()
    differences: Mapping[str, Mapping[str, Change]] = field(default_factory=dict)

    def compared(self, baseline: CheckpointResult) -> CheckpointResult:
        """The same with the differences to a baseline, in every number that both have of the same examples."""
        found: dict[str, dict[str, Change]] = {}
        for group, numbers in self.metrics.items():
            others = baseline.metrics.get(group, {})
            for name in filter(others.__contains__, numbers):
                change = change_by_example(numbers[name], others[name])
                verdict = difference(numbers[name], others[name], change)
                if change is not None and verdict is not None:
                    measured = Change(
                        change.value, change.standard_error, change.count, within_noise=verdict.within_noise
                    )
                    found.setdefault(group, {})[name] = measured
        return replace(self, differences=found)


@dataclass(frozen=True)
class Evaluation:
    """A comparison of checkpoints on the same examples, in the same order, under the same noise.

    conditions: what numbers depend on beside the examples and the seed. left_out: what was not measured, and why.
    baseline: label of the checkpoint that `differences` are to.
    """

    task: str
    num_examples: int
    seed: int
    conditions: Mapping[str, object]
    left_out: Mapping[str, str]
    baseline: str
    checkpoints: Annotated[tuple[CheckpointResult, ...], Field(min_length=1)]

    @classmethod
    def of(
        cls,
        task: str,
        num_examples: int,
        seed: int,
        results: Sequence[CheckpointResult],
        conditions: Mapping[str, object],
        left_out: Mapping[str, str],
    ) -> Evaluation:
        """With the differences to the first result."""
        first, *others = results
        compared = (first, *(each.compared(first) for each in others))
        return cls(task, num_examples, seed, conditions, left_out, first.label, compared)

    @property
    def has_answers(self) -> bool:
        """Whether answers were right or wrong; else they are texts."""
        return any("accuracy" in numbers for result in self.checkpoints for numbers in result.metrics.values())

    def to_json(self) -> dict[str, object]:
        """Every number with its standard error and its number of cases."""
        tree: dict[str, object] = _FORM.dump_python(self, mode="json", by_alias=True)
        return tree


_FORM = TypeAdapter(Evaluation)


def read_evaluation(folder: Path) -> Evaluation | None:
    """The evaluation in a folder, without its rollouts; None where there is none. ValueError if the file is another."""
    file = folder / EVALUATION_FILE
    if not file.is_file():
        return None
    try:
        return _FORM.validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{file} is no evaluation that this version can show: {where}: {first['msg']}") from None
