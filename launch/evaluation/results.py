"""What an evaluation found, and its form in `evaluation.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from launch.rollout_view import RolloutView
from launch.statistics import Difference, Estimate, change_by_example, difference

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
class CheckpointResult:
    """What was measured of one checkpoint."""

    label: str
    checkpoint: Path
    metrics: Metrics
    rollouts: tuple[ShownRollout, ...]

    def differences(self, baseline: CheckpointResult) -> dict[str, dict[str, tuple[Estimate, Difference]]]:
        """This minus `baseline`, example by example, where a number is one of examples; and what that says."""
        found: dict[str, dict[str, tuple[Estimate, Difference]]] = {}
        for group, numbers in self.metrics.items():
            others = baseline.metrics.get(group, {})
            for name in filter(others.__contains__, numbers):
                change = change_by_example(numbers[name], others[name])
                verdict = difference(numbers[name], others[name], change)
                if change is not None and verdict is not None:
                    found.setdefault(group, {})[name] = change, verdict
        return found


@dataclass(frozen=True)
class Evaluation:
    """A comparison of checkpoints on the same examples, in the same order, under the same noise.

    results: the first is the baseline of the differences. conditions: what numbers depend on beside the examples and
    the seed. left_out: what was not measured, and why.
    """

    task: str
    has_answers: bool
    num_examples: int
    seed: int
    results: tuple[CheckpointResult, ...]
    conditions: Mapping[str, object] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Every number with its standard error and its number of cases."""
        baseline = self.results[0]
        return {
            "task": self.task,
            "num_examples": self.num_examples,
            "seed": self.seed,
            "conditions": dict(self.conditions),
            "left_out": dict(self.left_out),
            "baseline": baseline.label,
            "checkpoints": [
                {
                    "label": result.label,
                    "checkpoint": str(result.checkpoint),
                    "metrics": {
                        group: {name: number.to_json() for name, number in numbers.items()}
                        for group, numbers in result.metrics.items()
                    },
                    "differences": {
                        group: {
                            name: {**change.to_json(), "within_noise": verdict.within_noise}
                            for name, (change, verdict) in numbers.items()
                        }
                        for group, numbers in result.differences(baseline).items()
                        if result is not baseline
                    },
                }
                for result in self.results
            ],
        }
