"""What a comparison found, and its form in `compare.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.compare.plan import COMPARED_STAGE
from launch.run_folder.folder import METRICS_FILE
from launch.statistics import CONFIDENCE, Difference, Estimate, Spread, differences_to, spread

Key = tuple[str, int]
"""Label of an objective, and seed."""
Numbers = Mapping[str, Estimate]
"""`group.name` -> number."""


@dataclass(frozen=True)
class MeasuredRun:
    """A run that is done. cost: see `stage_cost`. changes: differences to the reference, example by example."""

    cost: Mapping[str, float]
    estimates: Numbers
    changes: Numbers


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
    """A finished comparison. objectives: labels; the first is the reference. failures: of runs, by their names."""

    task: str
    steps: int
    objectives: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: Mapping[Key, MeasuredRun]
    failures: Mapping[str, str]

    @property
    def reference(self) -> str:
        """The objective that the others are compared with."""
        return self.objectives[0]

    def metrics(self) -> list[ComparedMetric]:
        """Every number that an objective has, in the order of the evaluation."""
        found = []
        for name in dict.fromkeys(name for run in self.runs.values() for name in run.estimates):
            numbers: dict[str, dict[int, Estimate]] = {label: {} for label in self.objectives}
            changes: dict[str, dict[int, Estimate]] = {label: {} for label in self.objectives}
            for (label, seed), run in self.runs.items():
                for side, of_run in ((numbers, run.estimates), (changes, run.changes)):
                    if name in of_run:
                        side[label][seed] = of_run[name]
            spreads = {label: each for label, by_seed in numbers.items() if (each := spread(by_seed)) is not None}
            group, _, metric = name.rpartition(".")
            differences = differences_to(self.reference, numbers, changes)
            found.append(ComparedMetric(group, metric, spreads, differences))
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
                    "arms": {label: asdict(found) for label, found in metric.spreads.items()},
                    "differences": {label: found.to_json() for label, found in metric.differences.items()},
                }
                for metric in self.metrics()
            ],
            "runs": [
                {
                    "arm": label,
                    "seed": seed,
                    **run.cost,
                    "metrics": {name: number.to_json() for name, number in run.estimates.items()},
                }
                for (label, seed), run in self.runs.items()
            ],
            "failures": dict(self.failures),
        }
        return json.dumps(tree, indent=2) + "\n"


def stage_cost(run: Path) -> dict[str, float]:
    """Steps of the compared stage, actions that they were trained on, of experts and rollouts, and seconds that they
    took, with waits for data. Of a step that was repeated the later line counts.
    """
    lines = (run / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    rows = {row["step"]: row for row in map(json.loads, lines) if row["stage"] == COMPARED_STAGE}.values()
    actions = round(sum(row["actions_per_s"] * row["step_s"] for row in rows))
    return {"steps": len(rows), "actions": actions, "seconds": sum(row["step_s"] for row in rows)}


def read_measured(evaluation_file: Path, reference: str) -> dict[str, tuple[Numbers, Numbers]]:
    """The numbers of an evaluation, and the differences to the reference if that is its baseline, by label."""
    tree = json.loads(evaluation_file.read_text(encoding="utf-8"))
    return {
        each["label"]: (_flat(each["metrics"]), _flat(each["differences"]) if tree["baseline"] == reference else {})
        for each in tree["checkpoints"]
    }


def _flat(groups: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Numbers:
    return {
        f"{group}.{name}": Estimate(number["value"], number["standard_error"], int(number["n"]))
        for group, numbers in groups.items()
        for name, number in numbers.items()
    }
