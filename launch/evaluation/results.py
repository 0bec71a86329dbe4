"""What an evaluation found, and its form in files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launch.evaluation.estimates import Estimate, difference, is_within_noise
from launch.rollout_view import RolloutView

HELD_OUT = "held_out"
"""The group of numbers that are of the held-out texts themselves, not of rollouts."""

Metrics = Mapping[str, Mapping[str, Estimate]]
"""Group -> name -> number."""


@dataclass(frozen=True)
class Target:
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

    def differences(self, baseline: CheckpointResult) -> dict[str, dict[str, Estimate]]:
        """This minus `baseline`, example by example, where a number is one of examples."""
        found: dict[str, dict[str, Estimate]] = {}
        for group, numbers in self.metrics.items():
            for name, number in numbers.items():
                other = baseline.metrics.get(group, {}).get(name)
                change = None if other is None else difference(number, other)
                if change is not None:
                    found.setdefault(group, {})[name] = change
        return found


@dataclass(frozen=True)
class Evaluation:
    """A comparison of checkpoints on the same examples, in the same order, under the same noise.

    results: the first is the baseline of the differences.
    conditions: what numbers depend on beside the examples and the seed. left_out: what was not measured, and why.
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
                    "metrics": _to_json(result.metrics),
                    "differences": {} if result is baseline else _changes_to_json(result.differences(baseline)),
                }
                for result in self.results
            ],
        }


def _to_json(metrics: Metrics) -> dict[str, object]:
    return {
        group: {name: _estimate_to_json(number) for name, number in numbers.items()}
        for group, numbers in metrics.items()
    }


def _changes_to_json(metrics: Metrics) -> dict[str, object]:
    return {
        group: {
            name: {**_estimate_to_json(change), "within_noise": is_within_noise(change)}
            for name, change in numbers.items()
        }
        for group, numbers in metrics.items()
    }


def _estimate_to_json(number: Estimate) -> dict[str, float | int | None]:
    return {"value": number.value, "standard_error": number.standard_error, "n": number.count}
