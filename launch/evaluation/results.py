"""What an evaluation found, and its form in files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launch.evaluation.estimates import Estimate
from launch.rollout_view import RolloutView

GREEDY, SAMPLED, RECOVERY = "greedy", "sampled", "recovery"


@dataclass(frozen=True)
class Target:
    """A checkpoint to evaluate. label: its name in tables and files."""

    label: str
    checkpoint: Path


@dataclass(frozen=True)
class ShownRollout:
    """A rollout to look at. group: GREEDY, SAMPLED or RECOVERY; is_correct: None where nothing says so."""

    group: str
    view: RolloutView
    is_correct: bool | None


@dataclass(frozen=True)
class CheckpointResult:
    """What was measured of one checkpoint. metrics: group -> name -> number."""

    label: str
    checkpoint: Path
    metrics: dict[str, dict[str, Estimate]]
    rollouts: tuple[ShownRollout, ...]


@dataclass(frozen=True)
class Evaluation:
    """A comparison of checkpoints on the same examples, in the same order, under the same noise."""

    task: str
    has_answers: bool
    num_examples: int
    seed: int
    results: tuple[CheckpointResult, ...]

    def to_json(self) -> dict[str, object]:
        """Every number with its standard error and its number of cases."""
        return {
            "task": self.task,
            "num_examples": self.num_examples,
            "seed": self.seed,
            "checkpoints": [
                {
                    "label": result.label,
                    "checkpoint": str(result.checkpoint),
                    "metrics": {
                        group: {name: _estimate_to_json(number) for name, number in numbers.items()}
                        for group, numbers in result.metrics.items()
                    },
                }
                for result in self.results
            ],
        }


def _estimate_to_json(number: Estimate) -> dict[str, float | int | None]:
    return {"value": number.value, "standard_error": number.standard_error, "n": number.count}
