"""What a comparison found, and its form in `compare.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.compare.plan import COMPARED_STAGE
from launch.evaluation.results import CheckpointResult
from launch.report.gather import read_metrics
from launch.statistics import CONFIDENCE, Difference, Estimate, Spread, differences_to, spread

Key = tuple[str, int]
"""Label of an objective, and seed."""


@dataclass(frozen=True)
class ComparedMetric:
    """One number over all objectives that have it, by label; `differences` are those of all but the reference.

    group: of rollouts, as `top_p=0.9`. name: within its group.
    """

    group: str
    name: str
    spreads: dict[str, Spread]
    differences: dict[str, Difference]

    @property
    def beyond_noise(self) -> list[str]:
        """The objectives whose difference to the reference chance does not explain."""
        return [label for label, found in self.differences.items() if found.within_noise is False]


@dataclass(frozen=True)
class Comparison:
    """A finished comparison. objectives: labels; the first is the reference. failures: of runs, by their names.

    runs: those that were evaluated. costs: of the same runs, see `stage_cost`.
    """

    task: str
    steps: int
    objectives: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: Mapping[Key, CheckpointResult]
    costs: Mapping[Key, Mapping[str, float]]
    failures: Mapping[str, str]

    @property
    def reference(self) -> str:
        """The objective that the others are compared with."""
        return self.objectives[0]

    def metrics(self) -> list[ComparedMetric]:
        """Every number that an objective has, in the order of the evaluation."""
        found = []
        names = ((group, name) for run in self.runs.values() for group, names in run.metrics.items() for name in names)
        for group, name in dict.fromkeys(names):
            numbers: dict[str, dict[int, Estimate]] = {label: {} for label in self.objectives}
            changes: dict[str, dict[int, Estimate]] = {label: {} for label in self.objectives}
            for (label, seed), run in self.runs.items():
                if (number := run.metrics.get(group, {}).get(name)) is not None:
                    numbers[label][seed] = number
                if (change := run.differences.get(group, {}).get(name)) is not None:
                    changes[label][seed] = change
            spreads = {label: each for label, by_seed in numbers.items() if (each := spread(by_seed)) is not None}
            differences = differences_to(self.reference, numbers, changes)
            found.append(ComparedMetric(group, name, spreads, differences))
        return found

    def to_json(self) -> str:
        """The content of `compare.json`: each run, each objective over seeds, each difference to the reference."""
        tree = {
            "task": self.task,
            "budget": f"{self.steps:,} steps",
            "arms": list(self.objectives),
            "reference": self.reference,
            "seeds": list(self.seeds),
            "confidence": CONFIDENCE,
            "metrics": [
                {
                    "name": f"{metric.group}.{metric.name}",
                    "arms": {label: found._asdict() for label, found in metric.spreads.items()},
                    "differences": {label: found.to_json() for label, found in metric.differences.items()},
                }
                for metric in self.metrics()
            ],
            "runs": [
                {
                    "arm": label,
                    "seed": seed,
                    **self.costs[label, seed],
                    "metrics": {
                        f"{group}.{name}": number.to_json()
                        for group, numbers in run.metrics.items()
                        for name, number in numbers.items()
                    },
                }
                for (label, seed), run in self.runs.items()
            ],
            "failures": dict(self.failures),
        }
        return json.dumps(tree, indent=2) + "\n"


def stage_cost(run: Path) -> dict[str, float]:
    """Steps of the compared stage, actions that they were trained on, of experts and rollouts, and seconds that they
    took, with waits for data.
    """
    stage = read_metrics(run)[COMPARED_STAGE]
    seconds = stage.values["step_s"]
    actions = round(float((stage.values["actions_per_s"] * seconds).sum()))
    return {"steps": len(stage.steps), "actions": actions, "seconds": float(seconds.sum())}
